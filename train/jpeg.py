"""JPEG files reduced to what their pixels need, or found to be irregular.

On some files with damaged segments, which libjpeg and so Pillow reads past, DALI 2.4.0 ends the process by a
segmentation fault. Only files whose segments are in order are given to it, without the notes that it would parse. That
makes the fault rarer, not impossible: docs/data.md.
"""

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
# Of the luma, across and down, where the colours have 1 x 1: 4:4:4, 4:2:2, 4:4:0, 4:2:0.
SAMPLINGS = (0x11, 0x21, 0x12, 0x22)
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
# Tables, restart interval, JFIF, and Adobe's note on the colour space; comments, EXIF and profiles are left out.
KEPT = (0xC4, 0xDB, 0xDD, 0xE0, 0xEE)
LEFT_OUT = (0xFE, *range(0xE1, 0xF0))


def regular_jpeg(data: bytes) -> bytes | None:
    """The file without its notes; None if it is no JPEG or its segments up to the first scan are not in order."""
    if data[:2] != bytes([0xFF, SOI]):
        return None
    kept, at, num_frames = [data[:2]], 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end < at + 4 or end > len(data):
            return None
        if marker == SOS:
            ends_well = data.rstrip(b"\0").endswith(bytes([0xFF, EOI]))
            return b"".join([*kept, data[at:]]) if num_frames == 1 and ends_well else None
        if marker in FRAMES:
            num_frames += 1
            if not _is_regular_frame(data[at + 4 : end]):
                return None
        if marker in FRAMES or marker in KEPT:
            kept.append(data[at:end])
        elif marker not in LEFT_OUT:
            return None
        at = end
    return None


def _is_regular_frame(body: bytes) -> bool:
    """Whether it has 8 bits, height and width, and 1 or 3 components in a sampling that encoders use."""
    if len(body) < 6 or body[0] != 8 or body[5] not in (1, 3) or len(body) != 6 + 3 * body[5]:
        return False
    samplings = body[7::3]
    return samplings[0] in SAMPLINGS and all(sampling == 0x11 for sampling in samplings[1:])
