"""Answers queries over HTTP from a trained workdir, with a page to try it on.

  python -m vixml_jax.serve --workdir=runs/NAME --port=8080 [--host=127.0.0.1]
      [--search=exact|scann] [--[no]retrieval_augmented] [--reload_index=10]

Needs no training data, and `pip install vixml_jax[serve]`. POST /v1/predict takes queries and gives their labels;
/openapi.json describes it; /healthz says when it is ready; /metrics is for Prometheus; / is the page. SIGTERM ends it
when what is in flight is answered, SIGHUP makes it look for a new snapshot of the label index.
"""

import gc
import io
from pathlib import Path
import sys

from absl import flags
import jax

from vixml_jax import cli
from vixml_jax.errors import InputError
from vixml_jax.inference.predictor import Predictor, load

_WORKDIR = flags.DEFINE_string("workdir", None, "A folder that vixml_jax.main wrote.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine.")
_PORT = flags.DEFINE_integer("port", 8080, "Port to listen on; 0 for a free one.", 0, 65_535)
_SEARCH = flags.DEFINE_enum("search", None, ["exact", "scann"], "How to search; by default as the index was built.")
_AUGMENTED = flags.DEFINE_bool("retrieval_augmented", False, "Whether training queries have a say, too.")
_LAMBDA = flags.DEFINE_float(
  "retrieval_lambda", None, "Weight of labels against training queries, 0 to 1; by default as in the evaluation."
)
_TEMPERATURE = flags.DEFINE_float(
  "retrieval_temperature", None, "Temperature of retrieval; by default as in the evaluation."
)
_TOWER = flags.DEFINE_string(
  "image_checkpoint", None, "The SigLIP tower, for pictures; by default the one that the features were made with."
)
_IMAGE_BATCH_SIZE = flags.DEFINE_integer("image_batch_size", 8, "Pictures that go through the tower at a time.", 1)
_MESH = flags.DEFINE_string("mesh", None, "data,fsdp,tensor, such as 4,1,2; by default as in training, or all devices.")
_RELOAD = flags.DEFINE_float(
  "reload_index", 0, "Seconds between looks for a new snapshot of the label index; 0 looks on SIGHUP only.", 0
)
_MAX_BATCH = flags.DEFINE_integer("max_batch", 64, "Queries that are encoded and searched together.", 1)
_MAX_WAIT = flags.DEFINE_float("max_wait_ms", 5, "Milliseconds that a query waits for others to share its batch.", 0)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 1_024, "Queries that wait; more get status 503.", 1)
_MAX_BODY = flags.DEFINE_float("max_body_mb", 16, "Most megabytes of a request.", 0.001)
_MAX_K = flags.DEFINE_integer("max_k", 100, "Most labels a query.", 1)
_MAX_QUERIES = flags.DEFINE_integer("max_queries", 64, "Most queries of a request.", 1)
_MAX_TEXT = flags.DEFINE_integer("max_text_chars", 10_000, "Most characters of a text.", 1)
_MAX_IMAGES = flags.DEFINE_integer("max_images", 8, "Most images of a query.", 1)
_MAX_NAMES = flags.DEFINE_integer("max_filter_names", 1_000, "Most names in a list of a filter.", 1)


class _NoTerminal(io.TextIOWrapper):
  """A terminal on which nobody draws progress bars: each batch of requests would have one."""

  def isatty(self) -> bool:
    return False


def main() -> None:
  """Serves what the flags name until it is stopped."""
  if jax.process_count() > 1:
    raise InputError("--distributed: serve runs in one process; start one on each machine")
  workdir = Path(cli.required(_WORKDIR))
  sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
  try:
    from vixml_jax.serving.limits import Limits
    from vixml_jax.serving.server import Server
  except ImportError as error:
    raise InputError(f"serving needs the package {error.name}: pip install vixml_jax[serve]") from error
  if _MAX_QUERIES.value > _MAX_QUEUE.value:
    raise InputError(f"--max_queries={_MAX_QUERIES.value}: must be no more than --max_queue={_MAX_QUEUE.value}")
  mesh = cli.mesh(_MESH)
  limits = Limits(
    body_bytes=int(_MAX_BODY.value * 10**6),
    queries=_MAX_QUERIES.value,
    k=_MAX_K.value,
    text_chars=_MAX_TEXT.value,
    images=_MAX_IMAGES.value,
    names=_MAX_NAMES.value,
    batch=_MAX_BATCH.value,
    wait_seconds=_MAX_WAIT.value / 1000,
    queue=_MAX_QUEUE.value,
  )

  def make() -> Predictor:
    predictor = load(
      workdir,
      search=_SEARCH.value,
      retrieval_augmented=_AUGMENTED.value,
      retrieval_lambda=_LAMBDA.value,
      retrieval_temperature=_TEMPERATURE.value,
      image_checkpoint=_TOWER.value,
      image_batch_size=_IMAGE_BATCH_SIZE.value,
      mesh=mesh,
    )
    gc.freeze()  # A collection that goes through the libraries' million objects stops every request for a second.
    return predictor

  Server(make, _HOST.value, _PORT.value, limits, _RELOAD.value or None).run()


if __name__ == "__main__":
  cli.run(main)
