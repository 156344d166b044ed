"""Log lines as JSON objects, one a line, with one for each request."""

import datetime
import json
import logging

from vixml_jax.serving.request_record import RequestRecord

_log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
  """Formats a log record as one JSON object on one line."""

  def format(self, record: logging.LogRecord) -> str:
    """Returns the line: time, level, logger and message, then the fields of a request or the text of an exception."""
    fields = {
      "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
      "level": record.levelname.lower(),
      "logger": record.name,
      "message": record.getMessage(),
      **getattr(record, "fields", {}),
    }
    if record.exc_info:
      fields["exception"] = self.formatException(record.exc_info)
    return json.dumps(fields, ensure_ascii=False)


def use_json_lines() -> None:
  """Lets all handlers of the root logger write JSON lines."""
  for handler in logging.getLogger().handlers:
    handler.setFormatter(JsonFormatter())


def log_request(record: RequestRecord) -> None:
  """Writes the line of a request that has been answered."""
  _log.info("request", extra={"fields": record.fields()})
