"""Collects the mutations of a kind of input."""

from hypothesis import strategies as st


def mutations_of(mutations):
  """Returns a decorator that adds the cases that a function draws to `mutations`, under the name of the function."""

  def mutation(function):
    @st.composite
    def cases(draw):
      return function(draw)

    mutations[function.__name__.strip("_").replace("_", " ")] = cases()
    return function

  return mutation
