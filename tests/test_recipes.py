"""The two recipes: what they promise, on numbers that no training batch contained."""

import statistics
from dataclasses import replace

import pytest

from course_utils.number_words import split_numbers
from course_utils.recipes import RECIPES
from course_utils.training import train, train_on_one_device


@pytest.mark.weekly  # lesson 11 trains both recipes in every run of the tests, and examines them
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_default_recipe_learns_to_read_numbers():
    """98 %: far from what is usual, so that only a real fault fails. Over two stages lesson 11 trains and examines it.

    Here the batches stay whole, which is nearly twice as fast on one device.
    """
    result = train_on_one_device(replace(RECIPES["default"], micro_batches=1))
    assert len(result.answers) == 500
    assert result.exact_match >= 0.98


@pytest.mark.weekly
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(400)
def test_the_article_s_recipe_learns_too_once_its_bugs_are_mended():
    """On one device for two of three seeds, which gives the same bits and the same time at a third of the cores."""
    recipe = RECIPES["article"]
    two_stages = train(recipe)
    others = [train_on_one_device(replace(recipe, seed=seed)) for seed in (1, 2)]
    results = [two_stages, *others]
    assert all(len(result.answers) == 100 for result in results)
    assert statistics.mean(result.exact_match for result in results) >= 0.92
    assert two_stages.seconds < 120  # usually a tenth


def test_the_article_s_recipe_is_ten_epochs_that_never_leave_the_warm_up():
    recipe = RECIPES["article"]
    numbers = split_numbers(recipe.lowest, recipe.highest, recipe.training_numbers, recipe.held_out)
    assert len(numbers.training) + len(numbers.held_out) == 1000
    assert recipe.steps == 10 * -(-len(numbers.training) // recipe.batch_size)
    assert recipe.steps < recipe.warm_up
