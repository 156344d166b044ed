"""Keys, host names, origins and content types are checked before anything else, and headers protect browsers."""

import json

import pytest

from tests.helpers.http_server import call, connect, predict, running
from vixml_jax.errors import InputError
from vixml_jax.serving.access import Access, read_keys

_BODY = json.dumps({"queries": [{"title": "sun"}]})
_SITE = "https://shop.example"


@pytest.fixture(scope="module")
def guarded(predictor):
  """Server with two keys and one origin."""
  access = Access.of("127.0.0.1", ["search.example"], [_SITE], ["first-key", "second-key"])
  with running(lambda: predictor, access=access) as server:
    yield server


def test_a_valid_key_is_needed_except_for_probes_and_the_page(guarded):
  for path in ("/healthz", "/readyz", "/", "/page.js", "/page.css"):
    assert call(guarded, path).status == 200
  for path in ("/metrics", "/openapi.json", "/v1/labels/label/3", "/v1/models", "/nothing"):
    assert call(guarded, path).status == 401
    assert call(guarded, path, Authorization="Bearer second-key").status in (200, 404)
  for given in ("", "first-key", "Bearer", "Bearer first", "Bearer first-key2", "Basic first-key", "Bearer \xff"):
    reply = call(guarded, "/v1/predict", _BODY, Authorization=given)
    assert reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization" in reply.json["error"]["message"] and reply.json["error"]["field"] is None
  assert call(guarded, "/v1/predict", _BODY, Authorization="Bearer first-key").status == 200
  refused = call(guarded, "/v1/embeddings", "{}").json["error"]
  assert (refused["type"], refused["code"]) == ("invalid_request_error", "invalid_api_key")


def test_keys_are_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
  (tmp_path / "keys").write_text("one\n\n  two\n")
  (tmp_path / "empty").write_text("\n")
  monkeypatch.delenv("VIXML_API_KEY", raising=False)
  assert read_keys(str(tmp_path / "keys")) == ["one", "two"] and read_keys(None) == []
  monkeypatch.setenv("VIXML_API_KEY", " three ")
  assert read_keys(None) == ["three"]
  for name, message in (("empty", "has no key"), ("missing", "cannot be read")):
    with pytest.raises(InputError, match=message):
      read_keys(str(tmp_path / name))


def test_a_page_of_another_site_may_call_if_its_origin_is_allowed(guarded):
  ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
  allowed = call(guarded, "/v1/predict", method="OPTIONS", Origin=_SITE, **ask)
  assert allowed.status == 200 and allowed.headers["Access-Control-Allow-Origin"] == _SITE
  assert "authorization" in allowed.headers["Access-Control-Allow-Headers"].lower()
  assert call(guarded, "/v1/predict", method="OPTIONS", Origin="https://evil.example", **ask).status == 400
  reply = call(guarded, "/v1/predict", _BODY, Origin=_SITE, Authorization="Bearer first-key")
  assert reply.status == 200 and reply.headers["Access-Control-Allow-Origin"] == _SITE
  assert call(guarded, "/v1/predict", _BODY, Origin=_SITE).headers["Access-Control-Allow-Origin"] == _SITE
  other = call(guarded, "/v1/predict", _BODY, Origin="https://evil.example", Authorization="Bearer first-key")
  assert "Access-Control-Allow-Origin" not in other.headers


def test_without_allowed_origins_no_page_of_another_site_is_answered(server):
  preflight = call(server, "/v1/predict", method="OPTIONS", Origin=_SITE, Access_Control_Request_Method="POST")
  assert preflight.status == 405 and "Access-Control-Allow-Origin" not in preflight.headers
  for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
    reply = call(server, "/v1/predict", _BODY, Content_Type=kind)
    assert reply.status == 415 and "application/json" in reply.json["error"]["message"]
  assert call(server, "/v1/predict", _BODY, Content_Type="Application/JSON; charset=utf-8").status == 200


def test_a_body_without_content_type_is_refused(server):
  connection = connect(server)
  connection.putrequest("POST", "/v1/predict")
  connection.putheader("Content-Length", str(len(_BODY)))
  connection.endheaders(_BODY.encode())
  assert connection.getresponse().status == 415
  connection.close()


@pytest.mark.parametrize(
  "host,given,good,bad",
  [
    ("127.0.0.1", (), ("localhost:80", "127.0.0.1", "[::1]:80", "LOCALHOST"), ("evil.example", "10.0.0.1", "")),
    ("0.0.0.0", ("shop.example",), ("10.1.2.3:80", "[fd00::1]", "shop.example"), ("evil.example", "a.shop.example")),
    ("127.0.0.1", ("*",), ("evil.example", ""), ()),
    ("search.example", (), ("search.example:8080",), ("evil.example", "search.example.evil", "x\udcff")),
  ],
)
def test_only_names_of_the_server_are_accepted(host, given, good, bad):
  access = Access.of(host, given)
  for name in good + bad:
    assert access.knows_host(name.encode("utf-8", "surrogateescape")) == (name in good), name


def test_a_rebound_name_is_refused(guarded):
  reply = call(guarded, "/healthz", Host="evil.example")
  assert reply.status == 421 and "--allowed_hosts" in reply.json["error"]["message"]
  assert call(guarded, "/healthz", Host="search.example:443").status == 200


@pytest.mark.parametrize(
  "given,message",
  [
    ({"origins": ["shop.example"]}, "--cors_origins=shop.example: must be an origin"),
    ({"origins": ["https://shop.example/"]}, "must be an origin"),
    ({"allowed_hosts": ["https://shop.example"]}, "--allowed_hosts=https://shop.example: must be a name"),
  ],
)
def test_bad_names_are_refused_at_start(given, message):
  with pytest.raises(InputError, match=message):
    Access.of("127.0.0.1", **given)


def test_headers_protect_the_page_and_no_answer_is_sniffed(server):
  page = call(server, "/")
  policy = page.headers["Content-Security-Policy"]
  assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
  assert page.headers["Referrer-Policy"] == "no-referrer" and page.headers["X-Frame-Options"] == "DENY"
  for reply in (page, predict(server, {"title": "sun"}), call(server, "/nothing"), call(server, "/metrics")):
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
