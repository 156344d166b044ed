"""Bodies of HTTP requests: valid ones, and mutations whose status and field are known."""

import base64
import io
import json

from hypothesis import strategies as st
from PIL import Image

from tests.bad_input import values
from tests.helpers.http_server import LIMITS

DIM, LABELS = 8, 24
"""Size of a feature vector and number of labels of the workdir `with_images`."""


def png(rng):
  buffer = io.BytesIO()
  Image.frombytes("RGB", (8, 8), rng.randbytes(192)).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def query(rng):
  """Returns a valid query."""
  given = {"title": values.filled_text(rng)[:100]}
  optional = {
    "uid": values.odd_text(rng)[:100],
    "content": values.odd_text(rng)[:100],
    "images": [
      rng.choice((png(rng), "data:image/png;base64," + png(rng), [0.5] * DIM)) for _ in range(rng.randrange(4))
    ],
    "allow": [f"label/{rng.randrange(LABELS)}" for _ in range(rng.randrange(1, 4))],
    "deny": [f"label/{rng.randrange(LABELS)}" for _ in range(rng.randrange(4))],
  }
  return given | {key: value for key, value in optional.items() if rng.random() < 0.3}


def body(rng):
  """Returns a valid body."""
  given = {"queries": [query(rng) for _ in range(rng.randrange(1, 4))]}
  return given | ({"k": rng.randrange(1, LIMITS.k + 1)} if rng.random() < 0.5 else {})


MUTATIONS = {}


def mutation(function):
  """Adds cases: a path, the bytes of a body, and the status and the start of the field, or 200 and the body."""

  @st.composite
  def cases(draw):
    return function(draw, body(draw(values.SEEDS)))

  MUTATIONS[function.__name__.strip("_").replace("_", " ")] = cases()
  return function


def _predict(given, status, field=None):
  content = given if isinstance(given, bytes) else json.dumps(given).encode()
  return "/v1/predict", content, status, field


def _change(draw, given, key, value):
  """Sets a value of a query, which must be refused."""
  number = draw(st.integers(0, len(given["queries"]) - 1))
  given["queries"][number][key] = value
  return _predict(given, 422, f"queries[{number}]")


@mutation
def nothing(draw, given):
  return _predict(given, 200, given)


@mutation
def not_json(draw, given):
  content = json.dumps(given).encode()
  bad = st.one_of(
    st.binary(max_size=40),
    st.integers(0, len(content) - 1).map(lambda end: content[:end]),
    st.sampled_from([content + b"x", content.replace(b'"queries"', b"queries"), b"\xff" + content, b"[" * 1_500]),
    st.sampled_from(
      [b'{"queries": [{"title": "\xff"}]}', rb'{"queries": [{"title": "\ud800"}]}', content.decode().encode("utf-16")]
    ),
  )
  return _predict(draw(bad), 400)


@mutation
def body_of_a_wrong_type(draw, given):
  value = draw(
    values.values_except(dict).filter(
      lambda value: json.dumps(value).find("N") < 0 and "Infinity" not in json.dumps(value)
    )
  )
  return _predict(json.dumps(value).encode(), 422)


@mutation
def queries_of_a_wrong_type(draw, given):
  wrong = st.one_of(
    st.sampled_from([[], {}, "a", 3, None, [None], ["a"], [[]], [1], [{}]]), st.just([given["queries"][0]] * 6)
  )
  return _predict(given | {"queries": draw(wrong)}, 422, "queries")


@mutation
def number_of_labels(draw, given):
  bad = st.sampled_from([0, -1, LIMITS.k + 1, 2**31, 2**63, -(2**70), 10**30, 1.5, 3.0, "3", True, [], {}])
  return _predict(given | {"k": draw(bad)}, 422, "k")


@mutation
def numbers_that_json_does_not_have(draw, given):
  number = draw(
    st.one_of(values.HUGE_INTEGERS.map(lambda text: text[:4_500]), st.sampled_from(["NaN", "Infinity", "1e999"]))
  )
  return _predict(json.dumps(given | {"k": 123456}).replace("123456", number).encode(), (400, 422))


@mutation
def text_of_a_wrong_type(draw, given):
  key = draw(st.sampled_from(["title", "content", "uid"]))
  return _change(draw, given, key, draw(st.sampled_from([1, 1.5, True, [], ["a"], {}, {"a": 1}])))


@mutation
def long_text(draw, given):
  key = draw(st.sampled_from(["title", "content", "uid"]))
  return _change(draw, given, key, "x" * draw(st.integers(LIMITS.text_chars + 1, 20_000)))


@mutation
def megabyte(draw, given):
  given["queries"][0]["title"] = draw(values.LONG_TEXTS)
  return _predict(given, 413)


@mutation
def thousands_of_values(draw, given):
  return _predict(given | {"more": [0] * draw(st.integers(LIMITS.body_values + 1, 9_000))}, 413)


@mutation
def blank_title(draw, given):
  given["queries"] = [{"title": draw(st.sampled_from(["", " ", "\u2003", "\n"]))}]
  return _predict(given, 422, "queries[0]")


@mutation
def unknown_key(draw, given):
  key = draw(
    st.one_of(values.TEXTS, st.sampled_from(["Title", "__proto__", "x" * 10_000])).filter(lambda key: key not in given)
  )
  if draw(st.booleans()):
    return _predict(given | {key: 1}, 422, "")
  number = draw(st.integers(0, len(given["queries"]) - 1))
  if key in ("title", "content", "uid"):
    key += "_"
  given["queries"][number][key] = None
  return _predict(given, 422, f"queries[{number}]")


@mutation
def image_that_cannot_be_read(draw, given):
  bad = st.one_of(
    st.binary(max_size=60).map(lambda content: base64.b64encode(content).decode()),
    st.sampled_from(
      ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", "data:,x", "data:image/png;base64,%", "\0"]
    ),
    st.sampled_from(["../../x.png", "data:image/svg+xml;base64,PHN2Zy8+", "é", "iVBORw0KGgo="]),
  )
  return _change(draw, given, "images", [draw(bad)])


@mutation
def vector_that_does_not_fit(draw, given):
  bad = [
    [0.5] * (DIM - 1),
    [0.5] * (DIM + 1),
    [],
    [1e300] * DIM,
    [65_520.0] * DIM,
    [None] * DIM,
    ["1"] * DIM,
    [[1.0] * DIM],
  ]
  return _change(draw, given, "images", [draw(st.sampled_from([*bad, [True] * DIM, [10**400] + [0.0] * (DIM - 1)]))])


@mutation
def unknown_label(draw, given):
  key = draw(st.sampled_from(["allow", "deny"]))
  name = draw(values.TEXTS.map(lambda text: f"{text}label/x"[:150]))
  if draw(st.booleans()):
    return _predict(given | {key: [name]}, 422, key)
  return _change(draw, given, key, ["label/1", name])


@mutation
def filter_of_a_wrong_type(draw, given):
  key = draw(st.sampled_from(["allow", "deny", "categories"]))
  return _change(
    draw, given, key, draw(st.sampled_from(["label/1", 1, {}, [1], [None], [["a"]], ["label/1"] * 7, True]))
  )


@mutation
def ranking_and_dial(draw, given):
  bad = [{"ranking": "best"}, {"ranking": 1}, {"tail": 2}, {"tail": -0.1}, {"tail": "1"}, {"min_probability": 1.5}]
  bad += [{"explain": "yes"}, {"explain": 1}, {"ranking": []}, {"tail": True}]
  change = draw(st.sampled_from(bad))
  return _predict(given | change, 422, next(iter(change)))


@mutation
def embeddings(draw, given):
  good = {"input": [query["title"] for query in given["queries"]], "model": "run"}
  bad = [{"input": []}, {"input": None}, {"input": [1, 2]}, {"input": [[1]]}, {"input": [""]}, {"input": ["x" * 201]}]
  bad += [
    {"input": {}},
    {"input": [None]},
    {"model": 3},
    {"model": "other"},
    {"model": None},
    {"dimensions": 7},
    {"dimensions": True},
  ]
  bad += [
    {"encoding_format": "int8"},
    {"encoding_format": []},
    {"dimensions": []},
    {"x" * 5_000: 1},
    {"input": ["a"] * 6},
  ]
  change = draw(st.sampled_from(bad))
  return "/v1/embeddings", json.dumps(good | change).encode(), (400, 404), next(iter(change))[:20]


@mutation
def other_body_of_embeddings(draw, given):
  content = json.dumps({"input": "a", "model": "run"}).encode()
  bad = st.one_of(
    st.binary(max_size=30),
    st.integers(0, len(content) - 1).map(lambda end: content[:end]),
    st.sampled_from([b"[]", b"3", b"null"]),
  )
  return "/v1/embeddings", draw(bad), 400, None
