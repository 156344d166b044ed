"""A server starts, answers, takes new snapshots of its index and stops, also as a command."""

import base64
from concurrent.futures import ThreadPoolExecutor
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from tests.helpers.http_server import call, connect, expected, labels_of, metric, png, predict, running, wait_for
from tests.helpers.miniature_runs import ROOT
from vixml_jax.errors import InputError
from vixml_jax.inference.loading import load_predictor
from vixml_jax.inference.predictor import Predictor
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.serving.batching import Batcher
from vixml_jax.serving.limits import Limits
from vixml_jax.serving.server import Server


def test_slow_bodies_and_too_many_queries_are_refused(predictor):
  limits = Limits(body_seconds=0.2, queue=2, batch=2)
  with running(lambda: predictor, limits) as server:
    reply = predict(server, *[{"title": "sun"}] * 3)
    assert reply.status == 503 and reply.headers["Retry-After"] == "1"
    assert reply.json["error"]["message"].startswith("too many queries are waiting")
    assert labels_of(predict(server, *[{"title": "sun"}] * 2))
    connection = connect(server)
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"que')
    assert connection.getresponse().status == 408
    connection.close()


def test_health_is_starting_and_then_ready(predictor):
  loaded = threading.Event()
  with running(lambda: loaded.wait() and predictor, ready=False) as server:
    wait_for(lambda: call(server, "/healthz").json["status"] == "starting")
    assert call(server, "/healthz").status == 200  # It lives, so it must not be restarted.
    assert call(server, "/readyz").status == 503
    assert predict(server, {"title": "sun"}).status == 503
    loaded.set()
    wait_for(lambda: call(server, "/readyz").status == 200)
    health = call(server, "/healthz").json
    assert health["labels"] == 24 and health["images"] == 2 and health["pictures"] and health["search"] == "exact"
    assert predict(server, {"title": "sun"}).status == 200


def test_health_fails_if_no_thread_answers_queries(predictor, monkeypatch):
  with running(lambda: predictor) as server:
    monkeypatch.setattr(Batcher, "alive", False)
    for path in ("/healthz", "/readyz"):
      reply = call(server, path)
      assert reply.status == 500 and "restart the server" in reply.json["error"]["message"]


def test_an_error_while_loading_stops_the_server_with_the_reason(tmp_path):
  server = Server(functools.partial(load_predictor, tmp_path))
  with pytest.raises(InputError, match="config.json"):
    server.run()


def test_an_address_in_use_is_refused():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(InputError, match=f"--port={port}: cannot be listened on .*in use"):
      Server(lambda: None, port=port)


def test_requests_in_flight_are_answered_before_it_stops(predictor, monkeypatch):
  arrived, go, encode = threading.Event(), threading.Event(), Predictor.encode
  with running(lambda: predictor) as server, ThreadPoolExecutor(1) as pool:
    monkeypatch.setattr(Predictor, "encode", lambda *args, **kw: arrived.set() or (go.wait() and encode(*args, **kw)))
    asked = pool.submit(predict, server, {"title": "sun"})
    arrived.wait()
    server.stop()
    go.set()
    assert labels_of(asked.result()) == expected(predictor, ["sun"], 10)
  with pytest.raises(ConnectionRefusedError):
    call(server, "/healthz")


def test_without_its_tower_it_refuses_image_files_and_takes_vectors(with_images, tmp_path, caplog):
  load = functools.partial(load_predictor, with_images.workdir, image_checkpoint=str(tmp_path / "none.npz"))
  with running(load) as server:
    assert not call(server, "/healthz").json["pictures"] and "image files are refused" in caplog.text
    reply = predict(server, {"title": "sun", "images": [base64.b64encode(png(8, 8)).decode()]})
    assert reply.status == 422 and "does not read image files" in reply.json["error"]["message"]
    assert labels_of(predict(server, {"title": "sun", "images": [[0.5] * 8]}))


def test_the_server_switches_to_a_new_snapshot_of_the_index_while_it_answers(texts_only, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(texts_only.workdir, workdir)
  load = functools.partial(load_predictor, workdir, retrieval_augmented=True)
  statuses, done = [], threading.Event()

  def ask(server):
    while not done.is_set():
      reply = predict(server, {"title": "sun", "allow": ["label/0", "label/1"]})
      statuses.append((reply.status, len(reply.json["answers"][0]["predictions"])))

  with running(load) as server, ThreadPoolExecutor(4) as pool:
    assert call(server, "/healthz").json["retrieval_augmented"]
    asking = [pool.submit(ask, server) for _ in range(4)]
    wait_for(lambda: (200, 2) in statuses)
    LabelIndex.open(workdir / "index", checkpoint=None).delete([0])
    server.reload()
    wait_for(lambda: call(server, "/healthz").json["labels"] == 23)
    wait_for(lambda: statuses[-1] == (200, 1))
    current = workdir / "index" / "CURRENT"
    valid = current.read_text()
    current.write_text("rubbish")
    server.reload()
    wait_for(lambda: metric(server, "vixml_index_reloads_total") == 2)
    current.write_text(valid)
    done.set()
    for each in asking:
      each.result()
    assert set(statuses) == {(200, 2), (200, 1)}
    text = call(server, "/metrics").body.decode()
    assert 'reloads_total{outcome="done"} 1.0' in text and 'reloads_total{outcome="failed"} 1.0' in text
    assert call(server, "/v1/labels/label/0").status == 404
    assert call(server, "/v1/labels/label/1").status == 200


def test_retrieval_augmentation_gives_what_the_api_gives(texts_only):
  predictor = load_predictor(texts_only.workdir, retrieval_augmented=True)
  with running(lambda: predictor) as server:
    queries = [
      {"title": query["title"]} | {key: query[key] for key in ("deny",) if key in query}
      for query in texts_only.queries[:5]
    ]
    assert labels_of(predict(server, *queries, k=6)) == expected(predictor, queries, 6)


def test_a_bug_gives_status_500_without_details(predictor, monkeypatch, caplog):
  with running(lambda: predictor) as server:
    monkeypatch.setattr(Predictor, "search", lambda *_, **__: 1 / 0)
    reply = predict(server, {"title": "sun"})
    monkeypatch.undo()
    assert reply.status == 500 and reply.json["error"] == {
      "field": None,
      "message": "the server failed on this request; see its log",
    }
    wait_for(lambda: "ZeroDivisionError" in caplog.text)  # The log is written after the answer is sent.
    assert predict(server, {"title": "sun"}).status == 200


def start_command(workdir, *flags, without=()):
  """Starts `python -m vixml_jax.serve` and returns the process and its URL when it is ready.

  Args:
    workdir: Folder of the run.
    *flags: Flags of the command.
    without: Names of environment variables that the command does not get.
  """
  environment = {name: value for name, value in os.environ.items() if name not in without} | {"XLA_FLAGS": ""}
  process = subprocess.Popen(
    [sys.executable, "-m", "vixml_jax.serve", f"--workdir={workdir}", "--port=0", *flags],
    cwd=ROOT,
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stderr:
    lines.append(line)
    if re.search(r"[ \"]ready after", line):
      break
  assert process.poll() is None, "".join(lines)
  return process, re.search(r"listening on ([^\s\"]+)", "".join(lines))[1]


class _Address:
  def __init__(self, url):
    self.url = url


@pytest.mark.slow
@pytest.mark.parametrize("flags,signals", [((), [signal.SIGHUP]), (("--reload_index=0.2",), [])])
def test_the_command_reloads_on_sighup_or_at_intervals_and_stops_on_sigterm(texts_only, tmp_path, flags, signals):
  workdir = tmp_path / "run"
  shutil.copytree(texts_only.workdir, workdir)
  process, url = start_command(workdir, *flags)
  try:
    server = _Address(url)
    assert call(server, "/healthz").json["labels"] == 24
    LabelIndex.open(workdir / "index", checkpoint=None).delete([0])
    for number in signals:
      process.send_signal(number)
    wait_for(lambda: call(server, "/healthz").json["labels"] == 23)
    assert predict(server, {"title": "sun"}).status == 200
  finally:
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0 and "Traceback" not in stderr, stderr


@pytest.mark.slow
def test_the_command_keeps_its_programs_and_takes_keys_names_origins_and_a_format_of_its_log(texts_only, tmp_path):
  keys, cache = tmp_path / "keys", tmp_path / "cache"
  keys.write_text("secret\n")
  flags = (f"--api_key_file={keys}", "--allowed_hosts=shop.example", "--cors_origins=https://shop.example")
  # The cache of the tests would take precedence over that of the flag.
  start = functools.partial(
    start_command,
    texts_only.workdir,
    *flags,
    "--log_format=json",
    "--rankings=plain,blend",
    "--max_batch=4",
    f"--compile_cache={cache}",
    without=("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"),
  )
  programs = lambda: {path.name for path in cache.rglob("*-cache")}
  process, url = start()
  try:
    first = programs()
    assert first
    server = _Address(url)
    assert call(server, "/metrics", Host="shop.example").status == 401
    body = json.dumps({"queries": [{"title": "sun"}], "ranking": "blend"})
    reply = call(server, "/v1/predict", body, Origin="https://shop.example", Authorization="Bearer secret")
    assert labels_of(reply) and reply.headers["Access-Control-Allow-Origin"] == "https://shop.example"
    assert call(server, "/healthz").json["rankings"] == ["plain", "blend"]
  finally:
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
  lines = [json.loads(line) for line in stderr.splitlines()]
  assert {line["status"] for line in lines if line["message"] == "request"} == {200, 401}
  process, _ = start()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert programs() == first


@pytest.mark.slow
def test_the_command_with_fewer_dimensions_takes_the_best_ranking_that_can_search_them(texts_only, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(texts_only.workdir, workdir)
  (workdir / "final_metrics.json").write_text(json.dumps({"P@1": 40.0, "RA/P@1": 41.0, "blend/P@1": 42.0}))
  process, url = start_command(workdir, "--dims=16", "--max_batch=4")
  try:
    health = call(_Address(url), "/healthz").json
    assert (health["ranking"], health["rankings"]) == ("retrieval_augmented", ["plain", "retrieval_augmented"])
  finally:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
