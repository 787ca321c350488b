import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest

from orchestrator.registry import InputError
from orchestrator.store import TEMPORARY, Sketch, StorageError, Store
from tests.faults import Line, Trouble, free_port, s3_server, tmpfs


@pytest.fixture(scope="module")
def credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.delenv("AWS_PROFILE", raising=False)
        yield


@pytest.fixture(scope="module")
def endpoint(credentials: None) -> Iterator[str]:
    """The URL of an S3 server in a process of its own, with one bucket."""
    pytest.importorskip("moto", reason="moto[server] is not installed, so there is no S3 to talk to")
    with s3_server() as url:
        yield url


@pytest.fixture(params=["local", "s3", "s3 without prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "not yet" / "there"))
    url: str = request.getfixturevalue("endpoint")
    prefix = f"/{tmp_path.name}/deep" if request.param == "s3" else ""
    return Store(f"s3://bucket{prefix}", url)


# ---- what both kinds promise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", bytes(range(256)) * 100_000], ids=["empty", "few", "25 MB"])
def test_bytes_come_back(store: Store, content: bytes) -> None:
    store.put("objects/one.bin", content)
    assert store.get("objects/one.bin") == content
    assert store.exists("objects/one.bin")


def test_a_put_replaces_what_was_there(store: Store) -> None:
    store.put("replaced/a.json", b"a longer first content")
    store.put("replaced/a.json", b"second")
    assert store.get("replaced/a.json") == b"second"
    assert store.names("replaced") == ["a.json"]


def test_parts_of_an_object_are_read_by_place_and_length(store: Store) -> None:
    store.put("folder/object", bytes(range(200)))
    assert store.ranges_of("folder/object", [(190, 10), (0, 0), (3, 2)]) == [bytes(range(190, 200)), b"", b"\3\4"]
    with pytest.raises(FileNotFoundError):
        store.ranges_of("folder/other", [(0, 1)])


def test_names_are_sorted_and_relative_to_their_folder(store: Store) -> None:
    for name in ("b.json", "a.json", "deep/er/c.json", "10.json", "9.json"):
        store.put(f"listed/{name}", b"x")
    store.put("listed-not/d.json", b"x")
    assert store.names("listed") == ["10.json", "9.json", "a.json", "b.json", "deep/er/c.json"]
    assert store.names("listed/") == store.names("listed")
    assert store.names("listed/deep") == ["er/c.json"]
    assert store.names("absent") == []


def test_what_is_absent_is_not_there(store: Store) -> None:
    store.put("present/a.json", b"x")
    assert not store.exists("present"), "a folder is no object"
    for name in ("present/b.json", "absent/a.json"):
        assert not store.exists(name)
        with pytest.raises(FileNotFoundError):
            store.get(name)


def test_delete_removes_one_object_and_may_be_repeated(store: Store) -> None:
    store.put("deleted/a", b"x")
    store.put("deleted/b", b"x")
    for _ in range(2):
        store.delete("deleted/a")
        assert store.names("deleted") == ["b"]
    store.delete("deleted/b")
    assert store.names("deleted") == []
    store.delete("never/there")


def test_a_put_of_what_is_not_bytes_leaves_the_old_content(store: Store) -> None:
    store.put("kept/a.json", b"old")
    with pytest.raises(TypeError):
        store.put("kept/a.json", "text")  # type: ignore[arg-type]
    assert store.get("kept/a.json") == b"old"
    assert store.names("kept") == ["a.json"]


def test_the_probe_leaves_nothing_behind(store: Store) -> None:
    before = store.names("")
    store.probe()
    assert store.names("") == before


def test_two_views_of_a_root_see_the_same(store: Store) -> None:
    store.put("shared/a", b"1")
    assert Store(store.root + "/", store.endpoint).get("shared/a") == b"1"


# ---- local ---------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond the limit: a write stops half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [b"old", None])
def test_a_local_put_that_fails_half_way_leaves_what_was_there(tmp_path: Path, old: bytes | None) -> None:
    store = Store(str(tmp_path))
    if old is not None:
        store.put("rows/a.json", old)
    with small_disk(100_000), pytest.raises(OSError, match="File too large"):
        store.put("rows/a.json", b"x" * 300_000)
    assert store.exists("rows/a.json") == (old is not None)
    if old is not None:
        assert store.get("rows/a.json") == old
    assert [path.name for path in (tmp_path / "rows").iterdir()] == (["a.json"] if old is not None else [])


KILLED = """
import os, sys, threading, time
from orchestrator.store import Store
threading.Thread(target=lambda: (time.sleep(float(sys.argv[2])), os._exit(9)), daemon=True).start()
store = Store(sys.argv[1])
while True:
    for letter in (b"a", b"b"):
        store.put("rows/a.json", letter * 20_000_000)
"""


def test_a_killed_writer_leaves_a_whole_object_and_its_remains_are_not_listed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("rows/a.json", b"o" * 20_000_000)
    remains = 0
    for delay in ("0.31", "0.33", "0.37", "0.41"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), delay], check=False)
        content = store.get("rows/a.json")
        assert content == content[:1] * 20_000_000
        assert store.names("rows") == ["a.json"]
        remains += len(list((tmp_path / "rows").glob(f"*{TEMPORARY}")))
    assert remains, "no writer was caught half-way: the test shows nothing"


def test_what_killed_writers_left_is_swept_up_and_a_living_writer_s_is_not(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("campaigns/k/blocks/0.safetensors", b"whole")
    old, new = (tmp_path / f"campaigns/k/blocks/1.safetensors.{name}{TEMPORARY}" for name in ("aa", "bb"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.sweep_up()
    assert (old.exists(), new.exists(), store.names("campaigns")) == (False, True, ["k/blocks/0.safetensors"])


def test_a_full_disk_is_one_sentence_and_keeps_no_half_of_anything(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, "1m"):
        store = Store(str(disk))
        store.put("rows/a.json", b"old")
        with pytest.raises(
            StorageError, match=r"disk' cannot keep rows/a.json \(2,000,000 bytes\): No space left"
        ) as full:
            store.put("rows/a.json", b"x" * 2_000_000)
        assert "\n" not in str(full.value)
        assert (store.get("rows/a.json"), [path.name for path in (disk / "rows").iterdir()]) == (b"old", ["a.json"])
        (disk / "fill").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))
        with pytest.raises(StorageError, match="No space left"):
            store.put("a/new/folder/b.json", b"y" * 10_000)
        with pytest.raises(StorageError, match="make room there and give the same command again"):
            Store(str(disk / "below")).put("c", b"z" * 10_000)
        (disk / "fill").unlink()
        store.put("rows/a.json", b"x" * 500_000)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only file system"):
            store.put("rows/b.json", b"y")
        assert store.get("rows/a.json") == b"x" * 500_000


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("runs")
    monkeypatch.chdir("/")
    store.put("a", b"x")
    assert (tmp_path / "runs/a").read_bytes() == b"x"
    assert store.url("a") == str(tmp_path / "runs/a")


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written and read") as caught:
            Store(str(root)).probe()
        assert str(root) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["gs://bucket/prefix", "http://host/x", "file:///tmp/x", "S3://bucket"])
def test_other_kinds_of_storage_are_refused(root: str) -> None:
    with pytest.raises(InputError, match="a local folder or s3://bucket/prefix"):
        Store(root)


@pytest.mark.parametrize("root", ["s3://KEYID:hunter2@bucket/x", "s3://KEYID:hunt/er2@bucket", "s3://KEYID@bucket"])
def test_a_root_that_holds_a_secret_is_refused_without_showing_it(root: str) -> None:
    with pytest.raises(InputError, match="set in the environment") as caught:
        Store(root)
    assert not re.search("KEYID|hunt", str(caught.value))


# ---- S3 ------------------------------------------------------------------------------------------------------------


def test_the_endpoint_may_come_from_the_environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    Store("s3://bucket/env").put("a", b"x")
    assert Store("s3://bucket/env", endpoint).get("a") == b"x"


def test_objects_are_where_other_clients_look(endpoint: str) -> None:
    store = Store("s3://bucket/some/prefix", endpoint)
    store.put("rows/a.json", b"content")
    client: Any = boto3.client("s3", endpoint_url=endpoint)
    assert client.get_object(Bucket="bucket", Key="some/prefix/rows/a.json")["Body"].read() == b"content"
    assert store.url("rows/a.json") == "s3://bucket/some/prefix/rows/a.json"


@contextmanager
def cut_off(endpoint: str, after: int) -> Iterator[str]:
    """The same server behind a line that goes dead, for good, once so many bytes went up."""
    host, port = "127.0.0.1", int(endpoint.rpartition(":")[2])
    listener = socket.create_server((host, 0))
    sent = 0

    def pump(source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        nonlocal sent
        with suppress(OSError):
            while data := source.recv(65536):
                sent += len(data) * upwards
                if sent > after:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if sent > after:
                client.close()
                continue
            server = socket.create_connection((host, port))
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with closing(listener):
        yield f"http://{host}:{listener.getsockname()[1]}"


@pytest.mark.parametrize("size", [1_000_000, 30_000_000])
def test_an_s3_put_that_is_cut_off_leaves_the_old_content(endpoint: str, size: int) -> None:
    direct = Store("s3://bucket/cut", endpoint)
    direct.put("rows/a.json", b"old")
    with (
        cut_off(endpoint, after=size // 2) as url,
        pytest.raises(StorageError, match=r"'s3://bucket/cut' .* AWS Error"),
    ):
        Store("s3://bucket/cut", url, patience_seconds=0.0).put("rows/a.json", b"x" * size)
    assert direct.get("rows/a.json") == b"old"
    assert direct.names("rows") == ["a.json"]


@pytest.mark.parametrize("trouble", ["slow down", "cut"])
def test_an_s3_in_trouble_for_a_while_is_waited_for(endpoint: str, trouble: Trouble) -> None:
    """Three seconds are more than the SDK's own three attempts outlast."""
    with Line(endpoint) as line:
        store = Store(f"s3://bucket/{trouble.replace(' ', '-')}", line.url)
        store.put("a/there", b"content")
        actions: dict[str, Callable[[], Any]] = {
            "put": lambda: store.put("a/new", b"x" * 100),
            "put in parts": lambda: store.put("a/big", b"y" * 30_000_000),
            "get": lambda: store.get("a/there"),
            "start": lambda: store.start_of("a/there", 3),
            "size": lambda: store.size("a/there"),
            "exists": lambda: store.exists("a/there"),
            "names": lambda: [name for name in store.names("a") if name == "there"],
            "delete": lambda: store.delete("a/never"),
            "absent": lambda: store.exists("a/absent"),
        }
        line.trouble(trouble, 3.0)
        with ThreadPoolExecutor(len(actions)) as threads:
            found = dict(zip(actions, threads.map(lambda action: action(), actions.values()), strict=True))
        assert line.refused >= 3 * len(actions), "the trouble was not felt"
    assert found == {
        "put": None,
        "put in parts": None,
        "get": b"content",
        "start": b"con",
        "size": 7,
        "exists": True,
        "names": ["there"],
        "delete": None,
        "absent": False,
    }
    store = Store(store.root, endpoint)
    assert store.get("a/big") == b"y" * 30_000_000
    assert store.names("a") == ["big", "new", "there"]


def test_an_s3_that_stays_away_is_one_sentence_that_names_the_root(endpoint: str) -> None:
    with Line(endpoint) as line:
        store = Store("s3://bucket/gone", line.url, patience_seconds=0.5)
        line.trouble("slow down", 60.0)
        for action in (lambda: store.put("a", b"x"), lambda: store.names(""), store.probe):
            with pytest.raises(
                StorageError, match=r"'s3://bucket/gone' stayed away for 0.5 s: .*503|SLOW_DOWN"
            ) as away:
                action()
            assert "\n" not in str(away.value)


def test_a_bucket_that_is_not_there_is_named(endpoint: str) -> None:
    with pytest.raises(InputError, match=r"s3://no-such-bucket/p.*existing bucket"):
        Store("s3://no-such-bucket/p", endpoint).probe()


def test_an_s3_that_nobody_answers_for_is_named_soon(credentials: None) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"'s3://bucket/p' cannot be written and read") as caught:
        Store("s3://bucket/p", f"http://127.0.0.1:{free_port()}").probe()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_an_s3_that_never_replies_is_named_soon(credentials: None) -> None:
    start = time.monotonic()
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
        pytest.raises(InputError, match="cannot be written"),
    ):
        Store("s3://bucket/p", f"http://127.0.0.1:{silent.getsockname()[1]}").probe()
    assert time.monotonic() - start < 20


def test_a_store_travels_to_another_process(store: Store) -> None:
    import pickle

    store.put("travels/a", b"x")
    assert pickle.loads(pickle.dumps(store)).get("travels/a") == b"x"


def test_a_sketch_is_the_store_with_what_is_put_in_it_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    store.put("rows/a.json", b"a")
    sketch = Sketch(store.root)
    sketch.sweep_up()
    sketch.probe()
    sketch.put("rows/b.json", b"b")
    sketch.put("rows/a.json", b"c")
    sketch.delete("rows/a.json")
    assert (sketch.get("rows/a.json"), sketch.get("rows/b.json")) == (b"a", b"b")
    assert [sketch.exists(f"rows/{name}.json") for name in "abc"] == [True, True, False]
    assert {name: store.get(f"rows/{name}") for name in store.names("rows")} == {"a.json": b"a"}
    Sketch(str(tmp_path / "none" / "yet")).probe()
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    with pytest.raises(InputError, match=r"a\.json' is no folder"):
        Sketch(f"{store.root}/rows/a.json/below").probe()
