# %% [markdown]
# # Cheat sheet: pipeline parallelism
# K stages, M micro-batches; f, b: time of a micro-batch's forward, backward in a stage. Each line is asserted in its lesson. *File > Print*: one page.
#
# | formula | what it says | lesson |
# | --- | --- | --- |
# | ∇L(wᵢ) = Σₘ ∇L(wᵢᵐ), Lᵐ = loss of m's tokens / all tokens | micro-batches add up | [05](05_micro_batches.ipynb) |
# | step = (M + K − 1) · (f + b) | equal stages | [07](07_bubble_and_stash.ipynb) |
# | bubble = (K − 1) / (M + K − 1) of the *total* time | GPipe; take M ≥ 4 K | [07](07_bubble_and_stash.ipynb) |
# | the same bubble = (K − 1) / M of the *ideal* time | Megatron-LM, Llama 3 | [07](07_bubble_and_stash.ipynb) |
# | step ≥ M · (f + b) of the slowest stage | balance by cost | [02](02_cut_it.ipynb) |
# | latency + bytes / bandwidth | a message | [03](03_two_processes_that_talk.ipynb) |
# | ∇(S · L) = S · ∇L | loss scale S | [08](08_mixed_precision.ipynb) |
# | n = ‖(‖g₁‖, ‖g₂‖, …)‖, g ← g · min(1, c / n) | one norm over all stages | [09](09_gradient_clipping.ipynb) |
# | η = d^−0.5 · min(s^−0.5, s · w^−1.5) | Noam; peak at step s = w | [10](10_noam_warm_up.ipynb) |
# | FLOPs of the model's step / (seconds · peak of all devices) | model FLOPs utilisation | [12](12_read_a_trace.ipynb) |
#
# **A step:** zero gradients · F and B of all micro-batches, ascending · unscale · norm of all stages · clip · optimizer, then learning rate (both skipped on all stages if the norm is not finite) · loss scale.
#
# | schedule | kept on stage k | bubble of the total time |
# | --- | --- | --- |
# | naive | 1 micro-batch | (K − 1) / K |
# | GPipe | M | (K − 1) / (M + K − 1) |
# | GPipe, all recomputed | inputs of M, graph of 1 | the same; each forward twice |
# | 1F1B | min(M, K − k) | (K − 1) / (M + K − 1) |
#
# | bytes per parameter | weight | gradient | Adam | in all |
# | --- | --- | --- | --- | --- |
# | fp32, also under autocast (and 2 for its cast while it is kept) | 4 | 4 | 8 | 16 |
# | 16-bit weights and gradients, fp32 master | 2 + 4 | 2 | 8 | 16 |
#
# **A hang:** who waits? · for what? · from whom? · what did that one do last? · since when? `print(run.status())` answers. A circle: deadlock. A chain that ends in computing: a slow stage; in a dead process: a crash. **A run you trust** has the fingerprint of one device, at equal micro-batches.
