"""What comes from outside is data and nothing else: no pickles, no code of a checkpoint, no path out of its root.

    pytest tests/test_security.py

Pages are tests/test_hostile_pages.py, parsers tests/test_fuzz.py.
"""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_tool
from PIL import Image
from test_datagen import data_set

from tag.au.annotate import check_images
from tag.data import images
from tag.data.datasets import affectnet
from tag.data.exchange import write_imagefolder
from tag.data.images import decode_image, load_image
from tag.data.records import Record, from_line, resolve_image, to_line
from tag.errors import DataError
from tag.lora import load_adapter
from tag.vlm import load_vlm

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tag/**/*.py"), *ROOT.glob("tools/**/*.py")])
SCRIPTS = sorted(ROOT.glob("tag/**/*.js"))

# ---------------------------------------------------------------- the sources

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def dangers(source: str) -> list[str]:
    """What in a Python source could unpickle or run what it reads: `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = ""
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLERS:
            what = f"imports from {node.module}"
        elif isinstance(node, ast.Import) and {a.name.partition(".")[0] for a in node.names} & (
            UNPICKLERS - {"pickle"}
        ):
            what = "imports an unpickler"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = node.value.id, node.attr
            if owner in UNPICKLERS and name != "UnpicklingError":  # an error may be caught
                what = f"{owner}.{name}"
            elif (owner, name) in {("os", "system"), ("os", "popen"), ("shutil", "unpack_archive")}:
                what = f"{owner}.{name}"
        elif isinstance(node, ast.Call):
            what = _dangerous_call(node)
        if what:
            found.append(f"{node.lineno}: {what}")
    return found


def _dangerous_call(node: ast.Call) -> str:
    given = {k.arg: k.value for k in node.keywords}
    name = ast.unparse(node.func)

    def is_constant(flag: str, value: object) -> bool:
        return isinstance(given.get(flag), ast.Constant) and given[flag].value is value

    if name in RUNNERS:
        return name
    if name in ("torch.load", "torch.hub.load", "torch.package.PackageImporter") and not is_constant(
        "weights_only", True
    ):
        return f"{name} without weights_only=True"
    if name in ("np.load", "numpy.load") and not is_constant("allow_pickle", False):
        return f"{name} without allow_pickle=False"
    if name in ("yaml.load", "yaml.unsafe_load") or name.endswith((".extractall", ".read_pickle")):
        return name
    if "shell" in given and not is_constant("shell", False):
        return "a shell"
    if "trust_remote_code" in given and not is_constant("trust_remote_code", False):
        return "trust_remote_code"
    owner, _, method = name.rpartition(".")
    if method == "from_pretrained":
        if owner.startswith("Auto") and not is_constant("trust_remote_code", False):
            return f"{name} may ask to run the checkpoint's code"
        models = ("Model", "ForConditionalGeneration", "ForCausalLM", "ForImageTextToText")
        if owner.endswith(models) and not is_constant("use_safetensors", True):
            return f"{name} may unpickle weights"
    if name == "Image.open" and "formats" not in given:
        return "Image.open of any format"
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_in_the_sources_unpickles_or_runs_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import dill",
        "from pickle import loads",
        "import pickle\npickle.loads(x)",
        "import pickle\nclass U(pickle.Unpickler): ...",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x)",
        "Qwen2_5_VLForConditionalGeneration.from_pretrained(x)",
        "AutoModelForImageTextToText.from_pretrained(x, trust_remote_code=False)",
        "pd.read_pickle(x)",
        "Image.open(path)",
    ],
)
def test_the_scan_sees_what_it_looks_for(bad):
    assert len(dangers(bad)) >= 1


def test_the_scan_lets_ordinary_code_pass():
    good = """
import pickle
torch.load(path, weights_only=True)
np.load(path, allow_pickle=False)
AutoTokenizer.from_pretrained(x, trust_remote_code=False)
model.eval()
re.compile(text)
try: ...
except pickle.UnpicklingError: ...
"""
    assert dangers(good) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_of_pages_never_make_html_or_code_of_text(path):
    text = path.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch(",
                 "XMLHttpRequest", "import(", "srcdoc", "javascript:"):  # fmt: skip
        assert word not in text, word


def test_only_the_landmark_model_is_ever_fetched():
    users = [p.name for p in SOURCES if "urlopen" in p.read_text() or "requests." in p.read_text()]
    assert users == ["model_file.py"]  # whose hash is compared before it is used


IMPORT_ALL = """
import importlib, pkgutil, sys
seen = []
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
sys.addaudithook(lambda event, args: seen.append(f"{event} {args}"[:200]) if event.startswith(watched) else None)
import tag
names = [m.name for m in pkgutil.walk_packages(tag.__path__, "tag.") if ".assets" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names), *seen, sep="\\n")
"""


@pytest.mark.slow
def test_importing_the_package_connects_to_nothing_and_starts_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    count, *seen = done.stdout.splitlines()
    assert int(count) > 80 and seen == []


# ---------------------------------------------------------------- checkpoints


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_weights_that_are_a_pickle_are_not_read(tmp_path, small_folder):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(small_folder, folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"model.embed_tokens.weight": Bomb(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"cannot load a Qwen2\.5-VL checkpoint"):
        load_vlm(str(folder), "float32")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_checkpoint_brings_is_not_run(tmp_path, small_folder, file):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(small_folder, folder)
    config = json.loads((folder / file).read_text())
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config |= {"auto_map": names}
    if file == "config.json":
        config["model_type"] = "evil"
    (folder / file).write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: ...\n")
    try:
        load_vlm(str(folder), "float32")  # the tokenizer is there without the code
        assert file == "tokenizer_config.json"
    except DataError as e:
        assert "\n" not in str(e)
    assert not marker.exists()


def test_an_adapter_of_absurd_size_is_refused_before_anything_is_made(tmp_path, small_folder, small_adapter):
    folder = tmp_path / "adapter"
    shutil.copytree(small_adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for changes in ({"r": 10**9}, {"r": 1e999}, {"lora_alpha": float("nan")}, {"lora_dropout": 2}, {"r": [1]}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(DataError, match=r"rank 1000000000|not a LoRA adapter configuration"):
            load_adapter(load_vlm(str(small_folder), "float32").hf_model, folder)


# ---------------------------------------------------------------- paths


@pytest.fixture
def tree(tmp_path):
    """A root with an image and links, and an image outside of it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "sub" / "in.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    os.symlink(root / "sub" / "in.png", root / "good-link.png")
    os.symlink(tmp_path / "out.png", root / "bad-link.png")
    os.symlink(tmp_path, root / "bad-folder")
    os.symlink(root / "loop-b", root / "loop-a")
    os.symlink(root / "loop-a", root / "loop-b")
    os.mkfifo(root / "fifo.png")
    return root


OUTSIDE = ("../out.png", "sub/../../out.png", "bad-link.png", "bad-folder/out.png", "/etc/hostname", "//etc/hostname")
NO_FILE = ("nowhere.png", "sub", "", ".", "fifo.png", "loop-a", "x" * 5000, "a\0b", "sub/in.png/x")


def record(image: str, **fields) -> Record:
    return Record("r", image, "d", fields.pop("split", "train"), "fear", **fields)


@pytest.mark.parametrize("name", OUTSIDE + NO_FILE)
def test_images_stay_inside_their_root(tree, name):
    with pytest.raises(DataError) as e:
        resolve_image(record(name), tree)
    assert ("leaves the image root" in str(e.value)) == (name in OUTSIDE) and "\n" not in str(e.value)
    assert name in check_images([name], tree)


@pytest.mark.parametrize("name", ["sub/in.png", "good-link.png", "sub/../sub/in.png", "./sub//in.png"])
def test_images_inside_are_found_however_they_are_named(tree, name):
    assert resolve_image(record(name), tree) == (tree / "sub" / "in.png").resolve()
    assert not check_images([name], tree)


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", ".hidden", "a/b", "a\0", "x" * 65, "train\n", "t\u0435st"])
def test_a_split_cannot_name_a_file_elsewhere(tree, name):
    """Regression: a record's split becomes a file's name in a build and an image folder; "../x" wrote there."""
    line = json.dumps({**vars(record("sub/in.png")), "split": name})
    with pytest.raises(DataError, match="field 'split'"):
        from_line(line)


def test_a_root_is_followed_once_and_nothing_leaves_it(tmp_path):
    """A link as root may be turned elsewhere while a run goes on: names still stand for files of the first folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_text(name)
    root = tmp_path / "root"
    assert images.inside(root, "x.png") == root / "x.png"  # not there yet: not remembered
    root.symlink_to("a")
    assert images.inside(root, "x.png").read_text() == "a"
    root.unlink()
    root.symlink_to("b")
    assert images.inside(root, "x.png").read_text() == "a"
    assert images.inside(root, "../b/x.png") is None and images.inside(root, str(tmp_path / "b" / "x.png")) is None
    (tmp_path / "a" / "out").symlink_to(tmp_path / "b")
    assert images.inside(root, "out/x.png") is None


def test_exports_write_inside_their_folder_only(tree, tmp_path):
    before = {p for p in tmp_path.rglob("*")}
    write_imagefolder([record("sub/in.png"), record("good-link.png", split="val")], tree, tmp_path / "hub")
    assert all(p.is_relative_to(tmp_path / "hub") for p in {*tmp_path.rglob("*")} - before)


def test_affectnets_lists_cannot_lead_out_of_it(tmp_path):
    lists, scenes = tmp_path / "A" / affectnet.LIST_FOLDER, tmp_path / "A" / affectnet.IMAGE_FOLDER
    lists.mkdir(parents=True)
    scenes.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    os.symlink(tmp_path, scenes / "link")
    head = ",".join((*affectnet.COLUMNS[:6], "expression"))
    for name in ("training", "validation"):
        (lists / f"{name}.csv").write_text(f"{head}\nlink/out.png,0,0,8,8,x,1\n")
    unpacked = list(affectnet.unpack(tmp_path / "A", "argmax"))
    for _, make in unpacked:
        with pytest.raises(DataError, match="leads out of"):
            make()
    assert len(unpacked) == 2


def test_a_build_refuses_records_that_lead_out(tree, tmp_path):
    tool, records = load_tool("build_tag310k"), data_set(tmp_path / "data", 3)
    lines = records.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "image": "../../root/sub/in.png"})
    records.write_text("\n".join(lines) + "\n")
    tool.main([str(records), "--image-root", str(records.parent), "--out", str(tmp_path / "out")])
    [rejected] = [json.loads(x) for x in (tmp_path / "out" / "rejected" / "00000.jsonl").read_text().splitlines()]
    assert rejected["reason"] == "image" and "leaves the image root" in rejected["detail"]


# ---------------------------------------------------------------- images


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 1_000_000), (1_000_000, 90), (10_001, 9_000)]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_absurd_sizes_are_refused_before_they_unfold(width, height):
    with pytest.raises(DataError, match="pixels"):
        decode_image(png(width, height, bytes(1000)), "x.png")


def test_a_text_chunk_that_unfolds_is_refused():
    """PIL's own limit; what counts is one line and no gigabyte."""
    whole = png(4, 4, bytes(4 * (1 + 3 * 4)))
    body = b"Comment\0\0" + zlib.compress(bytes(200 << 20))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    with pytest.raises(DataError, match=r"x\.png: "):
        decode_image(whole[:33] + chunk + whole[33:], "x.png")


def test_an_image_of_the_largest_size_is_read(tmp_path):
    Image.new("1", (10_000, 3)).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png").size == (10_000, 3)


def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    (tmp_path / "big.png").write_bytes(bytes(1001))
    with pytest.raises(DataError, match="no image of a face"):
        load_image(tmp_path / "big.png")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI"])
def test_formats_that_no_photograph_comes_in_are_not_read(kind):
    """EPS above all, for which PIL starts ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, kind)
    with pytest.raises(DataError, match="not an image file"):
        decode_image(buffer.getvalue(), "x.jpg")


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats_that_photographs_come_in_are_read(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 100, 50)).save(buffer, kind)
    assert decode_image(buffer.getvalue(), "x").size == (32, 24)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_raise_one_line():
    rng = np.random.default_rng(0)
    whole = []
    for kind in images.FORMATS:
        buffer = io.BytesIO()
        Image.effect_noise((24, 24), 50).convert("RGB").save(buffer, kind)
        whole.append(buffer.getvalue())
    refused = 0
    for i in range(1500):
        data = bytearray(whole[i % len(whole)])
        for at in rng.integers(0, len(data), rng.integers(1, 8)):
            data[at] = rng.integers(256)
        try:
            decode_image(bytes(data[: len(data) - int(rng.integers(0, 40)) * (i % 3 == 0)]), "x.png")
        except DataError as e:
            refused += 1
            assert str(e).startswith("x.png: ") and "\n" not in str(e) and len(str(e)) < 300
    assert 100 < refused < 1500


# ---------------------------------------------------------------- records


@pytest.mark.parametrize(
    "fields",
    [
        '"provenance": ' + '{"a": ' * 40 + "1" + "}" * 40,
        '"provenance": {"a": ' + "[" * 900 + "]" * 900 + "}",
        '"provenance": {"a": NaN}',
        '"provenance": {"a": [1e999]}',
        '"size": [1000001, 5]',
        '"size": [' + "9" * 4000 + ", 5]",
        '"aus": [{"au": "AU1", "score": NaN, "box": [1, 2, 3, 4]}]',
        '"aus": [{"au": "AU1", "score": 1, "box": [1, 2, 3, 1e3]}]',
    ],
)
def test_records_hold_only_what_can_be_written_again(fields):
    good = to_line(record("a.png"))
    from_line(good)
    with pytest.raises(DataError) as e:
        from_line(good[:-1] + f", {fields}}}", "f:1")
    assert str(e.value).startswith("f:1: ") and len(str(e.value)) < 300


def test_an_array_that_claims_to_be_huge_is_one_line(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (117 - len(header)) + b"\n"
    path = tmp_path / "1_exp.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8))
    with pytest.raises(DataError, match="not a NumPy file with one value"):
        affectnet._npy_text(path)
