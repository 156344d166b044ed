"""Exceptions that users see as one line without a traceback: bad input, and a run that was asked to stop."""


class InputError(ValueError):
  """Bad input that the user can correct: a file, a line, a key or a row.

  The message names what is wrong and what to do. Entry points print it on one line of stderr and exit with status 1.
  Any other exception is a bug and keeps its traceback.
  """


class Preempted(BaseException):
  """The process received SIGTERM and must end; the message says what was saved, and how to continue.

  Like `KeyboardInterrupt` it is no `Exception`, so that no library takes it for an error of its own. Entry points print
  the message and exit with 143.
  """


class StopTraining(Exception):
  """Ends training early: the model is then evaluated and saved as if all epochs had ended.

  A callback raises it in `on_step` or `on_evaluation`. The run is finished: the same call evaluates it again and does
  not train any further.
  """
