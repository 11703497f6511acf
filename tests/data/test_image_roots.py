"""Paths of a table that somebody else has written: no other server, no other credentials, no file outside the roots."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from distributed_rerank.cluster.decode_rows import _refs, manifest
from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.catalogue_files import read_catalogue, read_query_gallery
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations, paths
from distributed_rerank.storage.paths import ImageRoots, make_roots


def tell(catalogue: Catalogue) -> dict[str, str]:
    """What each image ends as: "read", or the reason why not."""
    found = {}
    for ref in catalogue.images():
        try:
            read_image(ref)
        except UnreadableImage as error:
            found[ref.id] = error.reason
        else:
            found[ref.id] = "read"
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A table's folder with a picture, beside another folder with one, and links between them."""
    for name in ("own/in.png", "other/out.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "own" / "link.png").symlink_to(tmp_path / "other" / "out.png")
    rows = {
        "inside": "in.png", "around": "../own/in.png", "link": "link.png", "up": "../other/out.png",
        "absolute": str(tmp_path / "other" / "out.png"), "uri": f"file://{tmp_path}/other/out.png",
        "absolute up": f"{tmp_path}/own/../other/out.png",
    }  # fmt: skip
    (tmp_path / "own" / "df.csv").write_text("id,path\n" + "".join(f"{id},{path}\n" for id, path in rows.items()))
    return tmp_path


def test_relative_path_must_not_leave_the_folder_of_its_table(photos: Path) -> None:
    found = tell(read_catalogue(str(photos / "own" / "df.csv")))
    refused = {id: reason for id, reason in found.items() if reason != "read"}
    words = "the path leaves the folder of the table; allow it with --image-root"
    assert refused == {"up": words, "absolute up": words}


def test_image_root_holds_for_all_paths_and_through_links(photos: Path) -> None:
    table = str(photos / "own" / "df.csv")
    found = tell(read_catalogue(table, image_roots=[str(photos / "own")]))
    assert {id for id, reason in found.items() if reason == "read"} == {"inside", "around"}
    assert {reason for reason in found.values() if reason != "read"} == {"outside --image-root"}
    both = [str(photos / "own"), f"{photos}/other/"]
    assert set(tell(read_catalogue(table, image_roots=both)).values()) == {"read"}
    with pytest.raises(BadInput, match=r"--image-root .*nowhere is no folder"):
        read_catalogue(table, image_roots=[str(photos / "nowhere")])


def test_roots_go_with_the_images_to_parts_unions_and_workers(photos: Path) -> None:
    table = str(photos / "own" / "df.csv")
    roots = [str(photos / "own")]
    whole = read_catalogue(table, image_roots=roots)
    parts = [
        whole.take(whole.items_of(["link", "up"])), whole.as_query_and_gallery(),
        read_query_gallery(table, table, image_roots=roots),
    ]  # fmt: skip
    for part in parts:
        assert tell(part)["link"] == "outside --image-root"
    refs = whole.images()
    (rows,) = manifest([(0, refs)])
    assert [(ref, ref.roots) for ref in _refs(rows)] == [(ref, ref.roots) for ref in refs]


@pytest.mark.parametrize("path", ["/proc/self/environ", "/proc/self/mem", "/dev/zero", "/dev/null", "/sys/kernel/mm"])
def test_files_that_are_none_are_never_opened(path: str, tmp_path: Path) -> None:
    words = "a device or a file of the kernel"
    assert words in ImageRoots().problem(path)
    assert words in make_roots([], ["/"]).problem(path)
    (tmp_path / "link.png").symlink_to(path)
    assert words in ImageRoots((str(tmp_path),)).problem(f"{tmp_path}/link.png")


def test_table_in_a_bucket_names_no_local_file() -> None:
    roots = ImageRoots(("s3://bucket/shop",))
    assert "in a table that is not local" in roots.problem("/home/user/private.png")
    assert "in a table that is not local" in roots.problem("file:///home/user/private.png")
    assert roots.problem("s3://bucket/shop/a.png") == roots.problem("s3://other/a.png") == ""
    named = make_roots(["s3://bucket/shop"], ["s3://bucket"])
    assert named.problem("s3://bucket/a.png") == ""
    assert named.problem("s3://bucket2/a.png") == named.problem("s3://other/a.png") == "outside --image-root"
    assert named.problem("s3://bucket/../other/a.png") == "outside --image-root"


BAD_URIS = [
    "s3://b?endpoint_override={host}&scheme=http/x.png", "s3://user:word@b/x.png", "s3://{host}/x.png",
    "s3://b#x/x.png", "s3://b%3Fendpoint_override={host}/x.png", "S3://b?endpoint_override={host}&scheme=http/x.png",
    "gs://b?endpoint_override={host}&scheme=http&anonymous=true/x.png", "abfs://container@{host}/x.png",
    "az://container@evil.example.com/x.png", "abfs://c@a.dfs.core.windows.net.evil.example.com/x.png",
    "hf://datasets/a/b/x::http://{host}/x.png", "hf://datasets/a/b/x.png?endpoint={host}", "http://{host}/x.png",
    "simplecache::http://{host}/x.png",
]  # fmt: skip


@pytest.mark.parametrize("uri", BAD_URIS)
def test_uri_reaches_no_server_of_its_own_choice(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers.get('Authorization')} {self.headers.get('X-Amz-Security-Token')}")
            self.send_response(404)
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    location = uri.format(host=f"127.0.0.1:{server.server_port}")
    (tmp_path / "df.csv").write_text(f"id,path\na,{location}\n")
    if paths.scheme_of(location) is not None:  # also where the hub is reached, which then would be asked first
        with pytest.raises(BadInput):
            locations._allowed_scheme(location, locations.SCHEMES)
    (reason,) = tell(read_catalogue(str(tmp_path / "df.csv"))).values()
    server.shutdown()
    server.server_close()
    assert reason != "read"
    assert not seen, "a server that the path named was asked"
    assert "connect" not in reason.lower()


def test_good_uris_stay_good() -> None:
    for location in (
        "s3://my-bucket.v2/a b?c#d.png", "gs://b_1/x.png", "abfs://c/x.png", "az://c@account.dfs.core.windows.net/x.png",
        "hf://datasets/a/b@main/x.png", "file:///a/b?.png",
    ):  # fmt: skip
        scheme = paths.scheme_of(location)
        assert locations._allowed_scheme(location, locations.SCHEMES) == scheme


@pytest.mark.parametrize("root", ["/", "//", "{}/", "{}//"])
def test_a_root_may_end_in_slashes_and_be_that_of_the_machine(photos: Path, root: str) -> None:
    found = tell(read_catalogue(str(photos / "own" / "df.csv"), image_roots=[root.format(photos)]))
    assert set(found.values()) == {"read"}
