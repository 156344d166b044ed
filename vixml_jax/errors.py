"""The exceptions that users see as a single line: bad input, and a run that was asked to stop."""


class InputError(ValueError):
  """Bad input: a file, a line, a key or a row that the user can mend.

  The message names what is at fault and what to do. Entry points print it on
  one line of stderr and exit with status 1; anything else that is raised is a
  bug and keeps its traceback.
  """


class Preempted(Exception):
  """SIGTERM arrived: the run was saved and goes on when it is started again. Entry points exit with 0."""
