# %% [markdown]
# # A tiny lesson
#
# It has all that the tests need: **prose**, a result, a picture, a mistake made on purpose.

# %% id="sum" tags=["nbval-check-output"]
total = sum(range(5))
total

# %% tags=["nbval-check-output"]
import sys

print("two lines")
print("in one stream", file=sys.stdout)

# %%
object()

# %% tags=["raises-exception", "nbval-check-output"]
from course_utils.authoring import AuthoringError

raise AuthoringError("made on purpose")

# %%
# the same cell twice

# %%
# the same cell twice

# %%
from IPython.display import display
from ipywidgets import IntSlider

display(IntSlider(value=total))
IntSlider()

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(1, 1))
plt.plot([0, 1])
plt.show()

# %%
# %precision 3
1 / 3
