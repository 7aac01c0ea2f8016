"""Says what a file is that people take for a picture: by its beginning, or by its name where there is none to read."""

from __future__ import annotations

STILLS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"}
"""Brands of pictures that stand in the same boxes as videos."""
SOUNDS = {b"M4A ", b"M4B "}
"""Brands of sound that stands in these boxes."""

VIDEO = "a video, and only still pictures are read: take pictures out of it, by ffmpeg -i VIDEO frame%04d.png for one"
HEIC = "HEIC and AVIF are not read: save the picture as JPEG or PNG"
SOUND = "sound, and only pictures are read"
DOCUMENT = "a PDF document, and only pictures are read: make pictures of its pages, by pdftoppm -png FILE page for one"
ARCHIVE = "an archive, and only pictures and plain tar files are read: unpack it, and give the folder"

BEGINNINGS = {
    b"\x1a\x45\xdf\xa3": VIDEO,
    b"\x00\x00\x01\xba": VIDEO,
    b"\x00\x00\x01\xb3": VIDEO,
    b"FLV\x01": VIDEO,
    b"OggS": VIDEO,
    b"\x30\x26\xb2\x75": VIDEO,
    b"ID3": SOUND,
    b"fLaC": SOUND,
    b"%PDF-": DOCUMENT,
    b"PK\x03\x04": ARCHIVE,
    b"\x1f\x8b": ARCHIVE,
    b"BZh": ARCHIVE,
    b"\xfd7zXZ\x00": ARCHIVE,
    b"\x28\xb5\x2f\xfd": ARCHIVE,
    b"7z\xbc\xaf\x27\x1c": ARCHIVE,
    b"Rar!\x1a\x07": ARCHIVE,
}
"""First bytes of a file -> what it is."""
ENDINGS = {
    VIDEO: "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv webm wmv",
    HEIC: "avif heic heif",
    SOUND: "aac aif aiff flac m4a mp3 oga ogg opus wav wma",
    DOCUMENT: "pdf",
    ARCHIVE: "7z bz2 gz rar tbz2 tgz txz xz zip zst",
}
"""What a file is -> endings of such files, without the dot."""


def kind_of(head: bytes) -> str:
    """Says what a file is by its first 16 bytes, in words that tell what to do with it; empty for anything else."""
    if head[4:8] == b"ftyp":
        return HEIC if head[8:12] in STILLS else SOUND if head[8:12] in SOUNDS else VIDEO
    if head[4:8] in (b"moov", b"mdat", b"wide"):
        return VIDEO
    if head[:4] == b"RIFF":
        return {b"AVI ": VIDEO, b"WAVE": SOUND}.get(head[8:12], "")
    return next((kind for beginning, kind in BEGINNINGS.items() if head.startswith(beginning)), "")


def kind_named(name: str) -> str:
    """Says the same by a file's name, or by the path of its address; empty where the ending may be a picture's."""
    _, dot, ending = name.rpartition(".")
    return next((kind for kind, endings in ENDINGS.items() if dot and ending.lower() in endings.split()), "")
