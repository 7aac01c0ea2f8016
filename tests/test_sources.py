"""Pictures of a run from folders, lists, tables and tar files."""

import hashlib
import io
import os
import tarfile

import pytest

from tests.jobs.fake import draw
from vlmfix import extras
from vlmfix.errors import DataError, MissingExtraError, PassingError, UsageError
from vlmfix.images import digest_of, open_found, read_ahead
from vlmfix.sources import source_of


def names(place, **options):
    return [file.name for file in source_of(place, **options)]


def packed(path, members):
    """A tar file of (name, bytes), or of TarInfo objects without content."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


@pytest.fixture
def pictures(tmp_path):
    return draw(tmp_path / "in", 3)


@pytest.fixture
def bytes_of(pictures):
    return {path.name: path.read_bytes() for path in pictures.iterdir()}


def test_a_list_names_pictures_beside_it_or_anywhere(tmp_path, pictures):
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfin/0001.png\r\n\n  in/0000.png \n" + os.fsencode(pictures / "0002.png")
    )
    found = list(source_of(tmp_path / "list.txt"))
    assert [file.name for file in found] == ["in/0001.png", "in/0000.png", str(pictures / "0002.png")]
    assert [open_found(file).image.getpixel((0, 0))[0] for file in found] == [1, 0, 2]


def test_a_list_may_name_what_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.txt").write_bytes(b"gone.png\n.\npipe\ncaf\xe9.png\n")
    found = list(read_ahead(source_of(tmp_path / "list.txt")))
    assert [file.name for file, _ in found] == ["gone.png", ".", "pipe", "caf\udce9.png"]
    assert [str(problem) for _, problem in found] == [
        "cannot be read: No such file or directory",
        "not a file with content (a device, socket or pipe)",
        "not a file with content (a device, socket or pipe)",
        "cannot be read: No such file or directory",
    ]


def test_what_is_no_list_is_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png\nb\0.png\n")
    with pytest.raises(UsageError, match=r"list\.txt, line 2 holds a zero byte"):
        names(tmp_path / "list.txt")
    (tmp_path / "pictures.csv").write_text("image\na.png\n")
    with pytest.raises(UsageError, match="is no CSV or Parquet file"):
        source_of(tmp_path / "list.txt", column="image")


def test_a_table_has_a_column_of_paths_and_perhaps_prompts(tmp_path):
    table = tmp_path / "t.CSV"
    table.write_text('\ufeffid,path,note\n1,a.png,"x, y"\n2,b.png,\n')
    assert (names(table), source_of(table).column, source_of(table).prompts) == (["a.png", "b.png"], "path", None)
    assert names(table, column="id") == ["1", "2"]
    text = "image,path,prompt\na.png,x,A?\na.png,x,B?\nb.png,x,A?\na.png,x,A?\na.png,x,A?\n"
    table.write_text(text)
    found = source_of(table)
    assert (found.column, found.prompts) == ("image", f"sha256:{hashlib.sha256(text.encode()).hexdigest()}")
    assert [(file.name, file.prompts) for file in found] == [
        ("a.png", ("A?", "B?")),
        ("b.png", ("A?",)),
        ("a.png", ("A?",)),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", r"columns \(none\), and none is image or path"),
        (b"name\na.png\n", "columns name, and none is image or path"),
        (b'image\na.png\n"b', "line 3: unexpected end of data"),
        (b"image,prompt\na.png,A?\nb.png,\n", "line 3 has an empty field"),
        (b"image,prompt\na.png\n", "line 2 has an empty field"),
        (b"image\na.png,b.png\n", "line 2 has too many fields"),
        (b"image\n\xff.png\n", "is not UTF-8 text, from line"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, text, problem):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(UsageError, match=problem):
        names(tmp_path / "t.csv")


def test_a_named_column_must_be_there(tmp_path):
    (tmp_path / "t.csv").write_text("image\na.png\n")
    with pytest.raises(UsageError, match="columns image, and none is file"):
        source_of(tmp_path / "t.csv", column="file")


def test_a_tar_file_holds_pictures_and_what_belongs_to_them(tmp_path, bytes_of):
    link = tarfile.TarInfo("0003.png")
    link.type, link.linkname = tarfile.SYMTYPE, "0000.png"
    long = "deep/" * 60 + "0002.png"
    shard = packed(
        tmp_path / "a.tar",
        [
            ("./0000.png", bytes_of["0000.png"]),
            ("0000.json", b"{}"),
            ("0001.seg.PNG", bytes_of["0001.png"]),
            ("._0001.png", b"of macOS"),
            (long, bytes_of["0002.png"]),
            (link, b""),
            ("0004.jpg", b"no picture"),
            ("0000.png", b"a second of that name"),
        ],
    )
    found = {file.name: shown for file, shown in read_ahead(source_of(shard))}
    assert list(found) == [f"a.tar/{name}" for name in ("0000.png", "0001.seg.PNG", long, "0003.png", "0004.jpg")]
    for number, name in enumerate(("0000.png", "0001.seg.PNG", long)):
        shown = found[f"a.tar/{name}"]
        assert shown.image.getpixel((0, 0)) == (number, 0, 0)
        assert shown.sha256 == hashlib.sha256(bytes_of[f"{number:04d}.png"]).hexdigest()
    assert str(found["a.tar/0003.png"]) == "not a plain file in its tar file"
    assert str(found["a.tar/0004.jpg"]).startswith("not a picture")
    assert digest_of(next(iter(source_of(shard)))) == found["a.tar/0000.png"].sha256


def test_tar_files_in_folders_and_lists(tmp_path, pictures, bytes_of):
    packed(pictures / "b.tar", [("x.png", bytes_of["0001.png"])])
    assert names(pictures) == ["0000.png", "0001.png", "0002.png", "b.tar/x.png"]
    (tmp_path / "list.txt").write_text("in/b.tar\nin/0000.png\n")
    assert names(tmp_path / "list.txt") == ["in/b.tar/x.png", "in/0000.png"]


def test_a_broken_tar_file_gives_what_stands_before(tmp_path, bytes_of):
    shard = packed(tmp_path / "a.tar", [(f"{n}.png", bytes_of["0001.png"]) for n in range(3)])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1600])
    found = list(source_of(shard))
    assert [file.name for file in found] == ["a.tar/0.png", "a.tar/1.png", "a.tar"]
    assert [isinstance(shown, DataError) for _, shown in read_ahead(found)] == [False, True, True]
    assert found[2].problem == "broken tar file: unexpected end of data"
    for content in (b"", b"no tar file" * 100):
        shard.write_bytes(content)
        ((name, problem),) = [(file.name, file.problem) for file in source_of(shard)]
        assert (name, problem.startswith("broken tar file: ")) == ("a.tar", True)
    (tmp_path / "list.txt").write_text("gone.tar\n")
    ((_, problem),) = read_ahead(source_of(tmp_path / "list.txt"))
    assert str(problem) == "broken tar file: No such file or directory"


def test_trouble_that_passes_is_not_the_files(tmp_path, pictures, monkeypatch):
    def away(*_, **__):
        raise OSError(5, "Input/output error")

    packed(tmp_path / "a.tar", [])
    (tmp_path / "list.txt").write_text("a.png\n")
    (tmp_path / "t.csv").write_text("image\na.png\n")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", away)
        with pytest.raises(PassingError, match=r"cannot read .*a\.tar"):
            names(tmp_path / "a.tar")
    sources = [source_of(tmp_path / name) for name in ("list.txt", "t.csv")]
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", away)
        for source in sources:
            with pytest.raises(PassingError, match="cannot read"):
                list(source)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        names(tmp_path / "gone.txt")


@pytest.fixture
def parquet(tmp_path):
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def written(name="x.parquet", group=1 << 20, **columns):
        files.write_table(arrow.table(columns), tmp_path / name, row_group_size=group)
        return tmp_path / name

    return written


def test_a_parquet_file_names_pictures(pictures, parquet):
    place = parquet(image=["in/0001.png", "in/0001.png", "in/0000.png"], prompt=["A?", "B?", "A?"])
    source = source_of(place)
    found = list(source)
    assert [(file.name, file.prompts) for file in found] == [("in/0001.png", ("A?", "B?")), ("in/0000.png", ("A?",))]
    assert [open_found(file).image.getpixel((0, 0))[0] for file in found] == [1, 0]
    assert (source.column, source.repeats) == ("image", True)
    other = source_of(parquet(image=["in/0001.png", "in/0001.png", "in/0000.png"], prompt=["A?", "B?", "C?"]))
    assert source.prompts != other.prompts


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("group", [3, 1 << 20])
def test_a_parquet_file_holds_pictures(tmp_path, parquet, nested, group):
    shown = [path.read_bytes() for path in sorted(draw(tmp_path / "many", 40).iterdir())]
    shown[7], shown[8] = b"", None
    cells = [{"bytes": content, "path": None} for content in shown] if nested else shown
    place = parquet(group=group, picture=cells, prompt=[f"{number}?" for number in range(40)])
    source = source_of(place, column="picture")
    found = list(source)
    assert [(file.name, file.prompts) for file in found][:2] == [("x.parquet/0", ("0?",)), ("x.parquet/1", ("1?",))]
    assert (len(found), source.repeats) == (40, False)
    opened = [picture for _, picture in read_ahead(found)]
    assert [str(opened[7]), str(opened[8])] == ["empty file", "its cell in the Parquet file holds no bytes"]
    fine = [number for number in range(40) if number not in (7, 8)]
    assert [opened[number].image.getpixel((0, 0))[0] for number in fine] == fine
    for number in (30, 2, 39):  # in any order
        assert open_found(found[number]).image.getpixel((0, 0))[0] == number
    assert digest_of(found[3]) == hashlib.sha256(shown[3]).hexdigest()
    place.unlink()
    assert digest_of(found[3]) is None


def test_a_damaged_parquet_file_costs_what_is_damaged(tmp_path, parquet):
    shown = [os.urandom(4000) for _ in range(60)]
    place = parquet(group=20, image=shown)
    raw, found = bytearray(place.read_bytes()), list(source_of(place))
    begin = raw.find(shown[20][:50])
    raw[begin - 20 : begin] = bytes(20)  # the header of its page
    place.write_bytes(raw)
    said = [digest_of(file) for file in found]
    right = [hashlib.sha256(content).hexdigest() for content in shown]
    assert (said[:20], said[40:]) == (right[:20], right[40:])
    assert said[20] != right[20]
    place.write_bytes(raw[:3000])
    assert [digest_of(file) for file in found] == [None] * 60
    with pytest.raises(DataError, match="its Parquet file is broken"):
        open_found(found[0])


def test_what_is_no_parquet_table_of_pictures_is_refused(tmp_path, parquet):
    (tmp_path / "y.parquet").write_bytes(b"nothing")
    for place, column, words in (
        (tmp_path / "y.parquet", None, r"y\.parquet is no whole Parquet file"),
        (parquet("1.parquet", image=["a.png"]), "other", "has the columns image, and none is other"),
        (parquet("2.parquet", image=[3]), None, "holds neither text nor bytes"),
        (parquet("3.parquet", image=["a.png"], prompt=[1]), None, "has a column prompt that holds no text"),
        (parquet("4.parquet", image=["a.png", None]), None, "row 1 has an empty field"),
        (parquet("5.parquet", image=["a.png"], prompt=[" "]), None, "row 0 has an empty field"),
    ):
        with pytest.raises(UsageError, match=words):
            list(source_of(place, column=column))


def test_what_parquet_needs_is_named(parquet, monkeypatch):
    place = parquet(image=["a.png"])
    monkeypatch.setitem(extras.EXTRAS, "parquet", ("no_such_module",))
    with pytest.raises(MissingExtraError, match=r"vlmfix\[parquet\]"):
        source_of(place)
