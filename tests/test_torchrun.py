"""Many machines: the same training when torchrun or srun has started the ranks, and what happens when one is lost.

Two torchruns of one process each stand for two machines: over loopback, and in two network namespaces with a cable
between them. `meet`, `share` and what is said of a wrong environment are tested without processes.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from course_utils import torchrun
from course_utils._plain import put_together, raw, room_for, spec_of, take_apart
from course_utils._surroundings import environment_for_workers
from course_utils.clocks import Offsets
from course_utils.jobs import Job, job_for, job_from
from course_utils.processes import StageError
from course_utils.recipes import RECIPES, TrainingConfig
from course_utils.threads import run_in_threads
from course_utils.timeline import Timeline
from course_utils.torchrun import NotAlike, compare_arguments, meet, run_this_rank, share
from course_utils.training import train, train_on_one_device
from course_utils.training_state import Step
from tests.models import TINY_RUN

ROOT = Path(__file__).resolve().parents[1]
IT_HUNG = 200.0  # seconds; on two quiet cores nothing here takes a tenth of it
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "job",
}
SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}


# --- Which rank is this? ---------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whatever has started these tests, no launcher's variables are there."""
    kept = environment_for_workers()
    for name in set(os.environ) - set(kept):
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_place_in_a_job_of_torchrun_or_srun():
    assert job_from(TORCHRUN) == job_from(SLURM) == Job(1, 2, "10.0.0.1", 29400)
    assert job_from({name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
    assert job_from({**SLURM, **TORCHRUN, "SLURM_PROCID": "0"}).rank == 1  # torchrun that srun has started


def test_nobody_s_job():
    assert job_from({}) is None
    assert job_from({"RANK": "3"}) is None  # some variable of somebody's
    assert job_from({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty bash
    assert job_from({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # the batch script itself


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": None}, "RANK is not set; it must be a whole number from 0 to 1. torchrun sets it"),
        ({"RANK": "2"}, "RANK is '2'; it must be a whole number from 0 to 1"),
        ({"RANK": "first"}, "RANK is 'first'; it must be a whole number"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number of at least 1"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set: it must name the machine of rank 0.*scontrol show hostnames"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set; it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ],
)
def test_a_wrong_environment_is_named_with_the_remedy(changes, named):
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=named):
        job_from(environment)


def test_a_wrong_environment_of_slurm_is_named_with_its_variables():
    with pytest.raises(ValueError, match="SLURM_PROCID is '2'; it must be a whole number from 0 to 1"):
        job_from({**SLURM, "SLURM_PROCID": "2"})
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS is 'two'"):
        job_from({**SLURM, "SLURM_STEP_NUM_TASKS": "two"})


def test_no_launcher_or_one_for_another_number_of_ranks(alone):
    with pytest.raises(ValueError, match="no torchrun has started this process.*torchrun --nproc-per-node 2.*launch"):
        train(TINY_RUN, run=run_this_rank)
    for name, value in TORCHRUN.items():
        alone.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but there are 3 ranks to run.*or train with --stages 2"):
        train(replace(TINY_RUN, stages=3), run=partial(run_this_rank, startup_limit=1.0))
    assert job_for(2).rank == 1 and not dist.is_initialized()


OTHERS = {
    **SLURM,
    **{"SLURM_STEPID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "a,b", "SLURM_TASKS_PER_NODE": "2"},
    **{"PMI_RANK": "1", "PMI_FD": "7", "PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_RANK": "1"},
    **{"MPI_LOCALRANKID": "0", "GLOO_DEVICE_TRANSPORT": "TCP_TLS", "TORCH_GLOO_LAZY_INIT": "1"},
}


def test_workers_of_launch_see_no_place_in_another_group(alone):
    of_the_whole_job = {"SLURM_JOB_ID": "5", "OMPI_MCA_btl": "tcp", "OMP_NUM_THREADS": "1"}
    for name, value in {**OTHERS, **TORCHRUN, **of_the_whole_job}.items():
        alone.setenv(name, value)
    alone.setenv("GLOO_SOCKET_IFNAME", "ib0")
    before = dict(os.environ)
    seen = environment_for_workers()
    assert dict(os.environ) == before
    assert set(before) - set(seen) == {*OTHERS, *TORCHRUN, "GLOO_SOCKET_IFNAME"}


# --- Finding the others ----------------------------------------------------------------------------------------------


def all_meet(store, addresses: list[str], limit: float = IT_HUNG) -> list[str | StageError]:
    """What `meet` gives, or raises, on each rank, if the ranks look into the store from these addresses."""
    found: dict[int, str | StageError] = {}

    def one(rank: int, address: str) -> None:
        try:
            found[rank] = meet(Job(rank, len(addresses), "x", 1), store, address, time.monotonic() + limit, limit)
        except StageError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(addresses) if pair[1]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(IT_HUNG)
    return [found[rank] for rank in sorted(found)]


def test_each_meeting_has_a_name_of_its_own_whatever_an_earlier_one_left_in_the_store():
    """torchrun starts workers anew with the store of the attempt before."""
    store = dist.HashStore()
    names = [all_meet(store, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]) for _ in range(5)]
    assert all(len(set(same)) == 1 for same in names)
    assert len({same[0] for same in names}) == 5


def test_what_an_earlier_attempt_left_is_not_taken_for_a_rank_that_is_there():
    store = dist.HashStore()
    all_meet(store, ["10.0.0.1", "10.0.0.2"])
    (error,) = all_meet(store, ["10.0.0.1", ""], limit=0.3)
    assert str(error).startswith("rank 1 did not come within 0.3 s (startup_limit), says rank 0 of 2 on ")
    assert "Were all machines started" in str(error) and error.kind == "limit"


def test_those_that_do_not_come_are_named_and_no_others():
    errors = all_meet(dist.HashStore(), ["10.0.0.1", "", "10.0.0.2", ""], limit=0.3)
    assert len(errors) == 2
    assert all(str(error).startswith("ranks 1 and 3 did not come within 0.3 s") for error in errors)


def test_a_rank_that_would_listen_where_no_other_machine_reaches_it_is_named():
    errors = all_meet(dist.HashStore(), ["127.0.1.1", "10.0.0.2"])
    for error in errors:
        assert "rank 0 would listen on 127.0.1.1" in str(error) and "--local-addr" in str(error)
        assert "GLOO_SOCKET_IFNAME" in str(error)
    assert all(isinstance(name, str) for name in all_meet(dist.HashStore(), ["127.0.0.1", "127.0.0.1"]))


def test_a_store_that_nobody_keeps(alone):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        job = {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1])}
        for name, value in job.items():
            alone.setenv(name, value)
        with pytest.raises(StageError, match="rank 1 of 2 on .* did not reach MASTER_ADDR 127.0.0.1.*rank 0 must"):
            run_this_rank(print, 2, startup_limit=1.0)


def test_a_job_of_one_rank_trains_too(alone):
    """In this process; the environment and the number of threads are afterwards as they were."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        alone.setenv(name, str(value))
    before = dict(os.environ), torch.get_num_threads()
    steps: list[Step] = []
    for _ in range(2):
        result = train(replace(TINY_RUN, stages=1), run=run_this_rank, on_step=steps.append)
    assert result.fingerprint == train_on_one_device(TINY_RUN).fingerprint
    assert [step.number for step in steps] == [0, 1, 2, 0, 1, 2]
    assert (dict(os.environ), torch.get_num_threads()) == before and not dist.is_initialized()


# --- What travels ----------------------------------------------------------------------------------------------------

VALUES = [
    *(None, True, 0, -(2**70), 0.1, float("inf"), "text with ümlauts", (), [], {}),
    {1: "a", "1": "b", (2, None): [3.0]},
    [(1, 2), [3, (4,)]],
    array("d", [0.1, 2.0]),
    Step(3, 0.1, float("inf"), 1e-3, 7, True, 65536.0),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_plain_values_arrive_as_they_were(value):
    again = put_together(json.loads(json.dumps(take_apart(value, []))), [], [Step])
    assert again == value and type(again) is type(value)


def test_tensors_of_every_kind_arrive_bit_by_bit():
    def work(worker):
        generator = torch.Generator().manual_seed(worker.rank)
        mine = {
            dtype: torch.randint(0, 2, (2, 3), generator=generator).to(dtype).T
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.complex64)
        }
        named = {str(dtype): tensor for dtype, tensor in mine.items()}
        return named, share(worker.transport, {**named, "scalar": torch.tensor(worker.rank), "none": torch.empty(0, 3)})

    ranks = run_in_threads(work, 3)
    for _, seen in ranks:
        assert [there["scalar"].item() for there in seen] == [0, 1, 2]
        assert all(there["none"].shape == (0, 3) for there in seen)
        for (own, _), there in zip(ranks, seen, strict=True):
            for name, tensor in own.items():
                assert there[name].dtype == tensor.dtype and torch.equal(there[name], tensor)


def test_what_could_hide_code_is_refused_on_both_sides():
    class Text(str):
        pass

    for value in (print, Text("x"), {1, 2}, [object()], Path("x")):
        with pytest.raises(TypeError, match="cannot travel between machines: send numbers, text"):
            take_apart(value, [])
    step = take_apart(VALUES[-1], [])
    wrong = [{**step, "class": "Popen"}, {**step, "fields": {"number": 1}}, {"eval": "1"}, {"tuple": "abc"}, [1]]
    for described in wrong:
        with pytest.raises(ValueError, match="has arrived, which is none of the values"):
            put_together(described, [], [Step])
    for spec in (["torch.load", [1]], ["torch.float32", [-1]], ["torch.float32", ["1"]], "x"):
        with pytest.raises(ValueError, match="which describes no tensor"):
            room_for(spec)
    assert room_for(spec_of(torch.zeros(2, 3, dtype=torch.bfloat16))).shape == (2, 3)
    assert raw(torch.zeros(2, 3, dtype=torch.bfloat16)).shape == (12,)


@pytest.mark.parametrize(("uncertainty", "applied"), [(1.0, True), (200.0, False)])
def test_timelines_of_other_machines_are_put_on_the_clock_of_rank_0(monkeypatch, uncertainty, applied):
    """Only if the clocks differ by more than could be measured: on one machine they are one clock."""
    offsets = Offsets((0.0, 100.0), (0.0, uncertainty))
    monkeypatch.setattr(torchrun, "estimate_offsets", lambda transport: offsets)

    def work(worker):
        timeline = Timeline(2, "measured", "seconds")
        timeline.add(worker.rank, "F", worker.rank, 0, 105.0, 106.0)
        return share(worker.transport, {"timelines": {7: timeline}})

    for seen in run_in_threads(work, 2):
        starts = [there["timelines"][7].start[0] for there in seen]
        assert starts == [105.0, 5.0 if applied else 105.0]


def test_ranks_that_were_started_with_other_options_are_told(tmp_path):
    def work(worker, arguments):
        compare_arguments(worker.transport, arguments[worker.rank])

    def refused(first, second):
        with pytest.raises(NotAlike) as caught:
            run_in_threads(work, 2, [first, second])
        return str(caught.value)

    text = refused([TINY_RUN, 5], [replace(TINY_RUN, seed=1), 5])
    assert text.startswith("TrainingConfig.seed is 0 on rank 0 and 1 on rank 1: start all ranks with the same options")
    assert refused([TINY_RUN, 5], [TINY_RUN, 6]).startswith("argument 1 is 5 on rank 0 and 6 on rank 1")
    assert refused([TINY_RUN, TINY_RUN], [replace(TINY_RUN, steps=9), TINY_RUN]).startswith("TrainingConfig.steps is 3")
    assert refused([TINY_RUN], [None]).startswith("TrainingConfig.batch_size is 7 on rank 0 and absent on rank 1")
    same = [TINY_RUN, object(), [tmp_path]]
    run_in_threads(work, 2, [same, [TINY_RUN, object(), [tmp_path]]])


# --- Real processes --------------------------------------------------------------------------------------------------


def with_processes(test: Callable) -> Callable:
    return pytest.mark.processes(pytest.mark.slow(pytest.mark.timeout(3 * IT_HUNG)(test)))


class Started:
    """The processes of one test: torchruns, and what they start. All are ended with it."""

    def __init__(self, folder: Path):
        self.folder, self.mark = folder, secrets.token_hex(8)
        self.processes: list[subprocess.Popen] = []
        self.environment = environment_for_workers()  # whatever has started these tests
        self.environment |= {"PYTHONPATH": str(ROOT), "TEST_MARK": self.mark, "TMPDIR": str(folder)}
        self.environment |= {"OMP_NUM_THREADS": "1"}  # torchrun would say that it sets it

    def start(self, *arguments: object, prefix: tuple[object, ...] = (), **variables: object) -> subprocess.Popen:
        """Run Python in the folder; what it writes goes to `output N`."""
        command = [*prefix, sys.executable, *arguments]
        with self.output(len(self.processes)).open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env=self.environment | {name: str(value) for name, value in variables.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def torchrun(self, node: int, port: int, *program: object, address: str = "127.0.0.1", **options: object) -> None:
        """The torchrun of one of two machines, whose address is given; number 0, at `endpoint`, keeps the store."""
        store = f"is_host={int(node == 0)},join_timeout={IT_HUNG:.0f},keep_alive_interval=3"  # seconds
        self.start(
            *("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--monitor-interval", 0.1),
            *("--max-restarts", options.get("max_restarts", 0), "--rdzv-id", self.mark, "--local-addr", address),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{options.get('endpoint', '127.0.0.1')}:{port}"),
            *("--rdzv-conf", store),
            *program,
            prefix=options.get("prefix", ()),
        )

    def output(self, number: int) -> Path:
        return self.folder / f"output {number}"

    def outputs(self) -> str:
        return "\n".join(self.output(number).read_text() for number in range(len(self.processes)))

    def finish(self) -> list[int]:
        """The exit statuses of all. Fails if one does not end."""
        give_up = time.monotonic() + IT_HUNG
        for process in self.processes:
            try:
                process.wait(max(0.1, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"it hung:\n{self.outputs()}")
        return [process.returncode for process in self.processes]

    def wait_for(self, path: Path) -> str:
        """What is in a file of the folder, as soon as anything is."""
        give_up = time.monotonic() + IT_HUNG
        while not path.exists() or not path.read_text():
            assert time.monotonic() < give_up, f"there is no {path.name}:\n{self.outputs()}"
            assert any(process.poll() is None for process in self.processes), self.outputs()
            time.sleep(0.01)
        return path.read_text()

    def end(self) -> None:
        """torchrun puts its workers into sessions of their own, and lets them live when it is killed."""
        for process in self.processes:
            process.kill()
            process.wait()
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark:
                    process.kill()
            except psutil.Error:
                continue


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    started.end()


def free_port() -> int:
    """Below those that systems give to outgoing connections, so that nobody is given it meanwhile."""
    while True:
        port = 15000 + secrets.randbelow(15000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue


HEAD = "import json, os, time\nfrom pathlib import Path\n"
TRAIN = """
from course_utils.checkpoint import Checkpoints
from course_utils.recipes import TrainingConfig
from course_utils.torchrun import run_this_rank
from course_utils.training import train
from course_utils.transformer import TransformerConfig

def stand_still(step):
    if step.number == STEP and not Path("reached").exists():
        Path("reached").write_text(str(os.getpid()))
        time.sleep(1000)

result = train(
    CONFIG, run=run_this_rank, on_step=stand_still, checkpoints=Checkpoints("run"), save_every=2, resume=True
)
report = {"fingerprint": result.fingerprint, "steps": [step.number for step in result.steps], "answers": result.answers}
Path(f"result {os.environ['RANK']}").write_text(json.dumps(report))
"""


def write_job(folder: Path, code: str, config: TrainingConfig = TINY_RUN, step: int = -1) -> Path:
    """A script: with TRAIN a training, whose last rank stands still in that step the first time."""
    path = folder / "job.py"
    path.write_text(HEAD + textwrap.dedent(code).replace("CONFIG", repr(config)).replace("STEP", str(step)))
    return path


def check_results(folder: Path, config: TrainingConfig, first_step: int = 0) -> None:
    """All ranks have the same result, and it is that of one device."""
    whole = train_on_one_device(config)
    expected = {
        "fingerprint": whole.fingerprint,
        "steps": list(range(first_step, config.steps)),
        "answers": {str(number): words for number, words in whole.answers.items()},
    }
    assert [json.loads((folder / f"result {rank}").read_text()) for rank in (0, 1)] == [expected, expected]


@with_processes
def test_the_command_on_two_machines_gives_what_one_device_gives(started):
    """One rank of the two prints and writes, the other is silent."""
    small = {"steps": 2, "batch_size": 16, "micro_batches": 4}
    options = [text for name, value in small.items() for text in (f"--{name.replace('_', '-')}", value)]
    command = ("-m", "course_utils.commands", "train", "--recipe", "article", *options, "--out", "out")
    port = free_port()
    for node in (0, 1):
        started.torchrun(node, port, *command)
    assert started.finish() == [0, 0], started.outputs()
    result = json.loads((started.folder / "out" / "result.json").read_text())
    reference = train_on_one_device(replace(RECIPES["article"], **small))
    assert result["fingerprint"] == reference.fingerprint and result["steps"] == 2
    assert result["exact_match"] == reference.exact_match
    for text in ("2 stages, 4 micro-batches", "2 steps in", f"fingerprint {reference.fingerprint}", "written: "):
        assert started.outputs().count(text) == 1, started.outputs()


@with_processes
def test_a_rank_killed_in_mid_run_goes_on_from_the_last_checkpoint(started):
    """torchrun starts both workers anew; what they do not do again is what the manifest says."""
    config = replace(TINY_RUN, steps=8, model=replace(TINY_RUN.model, dropout=0.1))
    job, port = write_job(started.folder, TRAIN, config, step=5), free_port()
    for node in (0, 1):
        started.torchrun(node, port, job, max_restarts=1)
    os.kill(int(started.wait_for(started.folder / "reached")), signal.SIGKILL)
    assert started.finish() == [0, 0], started.outputs()
    check_results(started.folder, config, first_step=4)


@with_processes
def test_a_rank_that_fails_is_named_and_the_other_one_ends_too(started):
    """Under the variables of srun, and without torchrun, which has its own ideas about what is to be ended."""
    code = """
    import torch
    from course_utils.processes import StageError
    from course_utils.torchrun import run_this_rank

    def work(worker, what):
        if what == "fails" and worker.rank == 1:
            raise LookupError("in the middle")
        if what == "returns a file" and worker.rank == 1:
            return open(os.devnull)
        if what == "other":
            return worker.rank
        buffer = torch.zeros(1)
        if worker.rank == 0:
            worker.transport.wait(worker.transport.irecv(buffer, 1, "a number"))
        else:
            worker.transport.wait(worker.transport.isend(buffer, 0, "a number"))

    rank = int(os.environ["SLURM_PROCID"])
    for what in ("fails", "returns a file", f"other {rank}", "other"):
        try:
            print(what, run_this_rank(work, 2, what))
        except (StageError, ValueError) as error:
            print(what, getattr(error, "kind", "refused"), error)
    """
    job, port = write_job(started.folder, code), free_port()
    for rank in (0, 1):
        place = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.start(job, **place)
    assert started.finish() == [0, 0], started.outputs()
    first, second = started.output(0).read_text(), started.output(1).read_text()
    lost = "failed: PeerLost: stage 0 lost stage 1 while it waited for a number from stage 1\n\nThe other rank's own"
    assert f"fails closed rank 0 of 2 on {socket.gethostname()} {lost} output says why it ended." in first
    assert f"fails exception rank 1 of 2 on {socket.gethostname()} failed: LookupError: in the middle\n" in second
    assert 'raise LookupError("in the middle")' in second and "The other rank's" not in second
    assert f"returns a file closed rank 0 of 2 on {socket.gethostname()} {lost}" in first
    assert "returns a file exception rank 1" in second and "TextIOWrapper cannot travel between machines" in second
    for rank, text in enumerate((first, second)):
        assert f"other {rank} refused argument 0 is 'other 0' on rank 0 and 'other 1' on rank 1" in text
        assert text.endswith("other [0, 1]\n"), text  # the next run in the same processes is a good one


@with_processes
def test_launch_inside_torchrun_is_a_world_of_its_own(started):
    """Compared are all variables that this torchrun gives to its worker, whatever their names, and some of Slurm."""
    code = """
    import torch, torch.distributed as dist
    from course_utils.processes import launch

    def look(worker):
        total = torch.tensor([worker.rank + 1.0])
        dist.all_reduce(total)
        return worker.rank, worker.world_size, total.item(), dict(os.environ)

    before = dict(os.environ)
    found = launch(look, 2)
    assert dict(os.environ) == before
    Path("found").write_text(json.dumps([before, found]))
    """
    job = write_job(started.folder, code)
    options = ("--nnodes", 1, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1")
    endpoint = ("--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    started.start("-m", "torch.distributed.run", *options, *endpoint, job, **OTHERS)
    assert started.finish() == [0], started.outputs()
    caller, ranks = json.loads((started.folder / "found").read_text())
    added = set(caller) - set(started.environment)
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} <= added
    assert [rank[:3] for rank in ranks] == [[0, 2, 3.0], [1, 2, 3.0]]
    for *_, seen in ranks:
        assert added & set(seen) == {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}  # a setting, and no place in a group


# --- Two hosts: two network namespaces with a cable between them ------------------------------------------------------


@pytest.fixture
def hosts(started: Started) -> Iterator[list[tuple[str, ...]]]:
    """Two hosts, 10.79.0.1 and 10.79.0.2: for each what to put before a command that is to run on it.

    A namespace without a name lives as long as the process that was started in it; the cable goes with it.
    """
    delay_line = pytest.importorskip("tests.benchmarks.delay_line", reason="needs Linux")
    if missing := [command for command in ("unshare", "nsenter") if shutil.which(command) is None]:
        pytest.skip(f"needs the commands {' and '.join(missing)} (package util-linux)")
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "1000"]) for _ in range(2)]
    try:
        for holder in holders:
            delay_line.wait_until(lambda h=holder: delay_line.has_own_network(h), time.monotonic() + IT_HUNG, "a host")
        first, second = (str(holder.pid) for holder in holders)
        cable = f"ip link add course0 netns {first} type veth peer name course0 netns {second}"
        made = subprocess.run(cable.split(), capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"cannot join two network namespaces here: {made.stderr.strip()}")
        inside = [("nsenter", f"--net=/proc/{pid}/ns/net") for pid in (first, second)]
        for number, host in enumerate(inside, start=1):
            for command in ("address add 10.79.0.{}/24 dev course0", "link set course0 up", "link set lo up"):
                subprocess.run([*host, "ip", *command.format(number).split()], check=True)
        yield inside
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


@pytest.mark.network
@with_processes
def test_a_host_that_vanishes_and_comes_back(started, hosts):
    """The host of rank 1 dies in mid-run: its torchrun and its worker. Then somebody starts its torchrun again.

    The variable is for torchrun: otherwise one that was there before tells a new one nothing of the store of the ranks
    (torch 2.13), and the new one gives up after a minute.
    """
    started.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = replace(TINY_RUN, steps=8)
    job, port = write_job(started.folder, TRAIN, config, step=5), free_port()
    for node in (0, 1):
        options = {"max_restarts": 1, "endpoint": "10.79.0.1", "address": f"10.79.0.{node + 1}", "prefix": hosts[node]}
        started.torchrun(node, port, job, **options)
    worker = psutil.Process(int(started.wait_for(started.folder / "reached")))
    for process in (worker.parent(), worker):
        process.kill()
    started.torchrun(1, port, job, **options)
    assert started.finish() == [0, -signal.SIGKILL, 0], started.outputs()
    check_results(started.folder, config, first_step=4)
