"""Every kind of clip is read frame by frame; what does not match or cannot be read is said in one clear message."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.quality_clips import moving_picture, write_image, write_images, write_video
from videopipe.quality import clips, compare_clips, open_clip
from videopipe.quality.align import check_pair, parse_align

REF = moving_picture(12, 64, 80)


def frames_of(path, decoder="auto"):
    return np.stack(list(open_clip(path, decoder).frames()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "exact.mp4", REF)
    write_video(root / "lossy.mp4", REF, codec="libx264", pix_fmt="yuv420p", crf="23")
    write_images(root / "images", REF)
    np.save(root / "frames.npy", REF)
    np.save(root / "float.npy", (REF / 255.0).astype(np.float32))
    save_file({"frames": torch.from_numpy(REF)}, root / "frames.safetensors")
    return root


@pytest.mark.parametrize("name", ["exact.mp4", "images", "frames.npy", "frames.safetensors"])
def test_exact_forms_give_the_same_bytes(folder, name):
    assert np.array_equal(frames_of(folder / name), REF)


def test_a_folder_is_read_in_natural_order(folder):
    wrong = sorted(p.name for p in (folder / "images").iterdir())  # frame_10 before frame_2
    assert [p.name for p in clips.image_files(folder / "images")] != wrong
    assert clips.image_files(folder / "images")[10].name == "frame_10.png"


def test_float_frames_are_scaled(folder):
    clip = open_clip(folder / "float.npy")
    assert np.allclose(next(iter(clip.frames())), REF[0], atol=1e-4)
    assert clip.info.bit_depth == 32


def test_decord_and_pyav_give_the_same_frames(folder):
    assert open_clip(folder / "lossy.mp4").info.decoder == "decord"
    assert np.array_equal(frames_of(folder / "lossy.mp4", "decord"), frames_of(folder / "lossy.mp4", "av"))


def test_what_decord_cannot_read_goes_to_pyav(tmp_path):
    path = write_video(tmp_path / "a.mp4", REF, codec="libsvtav1", pix_fmt="yuv420p", crf="30")
    clip = open_clip(path)
    assert clip.info.decoder == "av"
    assert len(list(clip.frames())) == len(REF)
    with pytest.raises(ValueError, match=r"decoder='decord' is not installed or cannot read .*a\.mp4, nearest is 'av'"):
        open_clip(path, "decord")


def test_files_that_decord_would_hold_in_memory_go_to_pyav(folder):
    size = (folder / "lossy.mp4").stat().st_size
    for limit, decoder in ((size, "decord"), (size - 1, "av")):
        assert clips.VideoClip(folder / "lossy.mp4", decord_bytes=limit).info.decoder == decoder


def test_both_sides_share_a_decoder(folder, tmp_path):
    av1 = write_video(tmp_path / "a.mp4", REF, codec="libsvtav1", pix_fmt="yuv420p", crf="30")
    ref, cand = open_clip(folder / "lossy.mp4"), open_clip(av1)
    result = compare_clips(ref, cand)
    assert (result.num_frames, ref.info.decoder, cand.info.decoder) == (12, "av", "av")


@pytest.mark.parametrize("shape", [(1, 4, 5, 6, 8), (4, 5, 6, 8)])
def test_latents_are_compared_per_latent_frame(tmp_path, shape):
    ref = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    cand = ref.clone()
    cand[..., 3, 2, 1] += 0.5
    save_file({"latents": ref}, tmp_path / "a.safetensors")
    save_file({"latents": cand}, tmp_path / "b.safetensors")
    result = compare_clips(open_clip(tmp_path / "a.safetensors"), open_clip(tmp_path / "b.safetensors"))
    assert (result.num_frames, result.first_different_frame, list(result.series)) == (
        5,
        3,
        ["max_abs", "mae", "rel_l2"],
    )
    assert result.series["max_abs"].worst == pytest.approx(0.5, abs=0.02)


def test_ten_bit_video_keeps_its_precision(tmp_path):
    path = write_video(
        tmp_path / "a.mp4", REF, codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=none"}
    )
    clip = open_clip(path)
    frame = next(iter(clip.frames()))
    assert (clip.info.bit_depth, clip.info.decoder, frame.dtype) == (10, "av", np.float32)
    assert (frame != np.rint(frame)).any()
    assert np.abs(frame - REF[0]).mean() < 20


def damaged(path, source, start, stop):
    data = bytearray(source.read_bytes())
    middle = slice(int(len(data) * start), int(len(data) * stop))
    data[middle] = bytes(byte ^ 0x5A for byte in data[middle])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("decoder", ["auto", "av"])
def test_damage_is_an_error_not_a_shorter_clip(folder, tmp_path, decoder):
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 80, 3), np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, codec="libx264", pix_fmt="yuv420p", crf="20")
    path = damaged(tmp_path / "bad.mp4", whole, 0.4, 0.6)
    with pytest.raises(ValueError, match=r"bad\.mp4: damaged: decoding stops after \d+ of 12 frames"):
        list(open_clip(path, decoder).frames())


def test_unreadable_inputs_are_named(folder, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes((folder / "lossy.mp4").read_bytes()[:-500])
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "text.safetensors").write_text("not tensors, but longer than eight bytes")
    (tmp_path / "void").mkdir()
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((2, 4, 4, 3), np.nan, np.float32))
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name, message in {
        "missing.mp4": "no such file or folder",
        "empty.mp4": "the file is empty",
        "text.mp4": "not a readable video",
        "cut.mp4": "not a readable video",
        "text.npy": "not a readable npy file",
        "text.safetensors": "not a readable safetensors file",
        "void": "the folder holds no image",
        "flat.npy": "neither frames",
        "none.npy": "neither frames",
        "objects.npy": "not a readable npy file",
        "two.safetensors": "need `frames` or `latents`",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            open_clip(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"frame 0 holds NaN or infinity"):
        list(open_clip(tmp_path / "nan.npy").frames())


def test_an_image_of_another_size_is_named(tmp_path):
    folder = write_images(tmp_path / "images", REF[:2])
    write_image(folder / "frame_7.png", REF[0, :32, :48])
    with pytest.raises(ValueError, match=r"frame_7\.png: is 48x32 with 8 bits, the first frame is 80x64"):
        list(open_clip(folder).frames())


def checked(ref, cand, align="", resize=False):
    return check_pair(open_clip(ref).info, open_clip(cand).info, parse_align(align), resize=resize)


def test_mismatches_name_both_values_and_the_way_out(folder, tmp_path):
    np.save(tmp_path / "short.npy", REF[:9])
    np.save(tmp_path / "small.npy", REF[:, ::2, ::2])
    np.save(tmp_path / "latents.npy", np.zeros((1, 4, 5, 6, 8), np.float32))
    fast = write_video(tmp_path / "fast.mp4", REF, fps=30)
    varying = write_video(tmp_path / "vfr.mp4", REF, times=[0, 20, 80, 120, 160, 240, 250, 290, 330, 400, 420, 460])
    ten = write_video(
        tmp_path / "ten.mp4", REF, codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=none"}
    )
    frames, video = folder / "frames.npy", folder / "exact.mp4"
    for ref, cand, message, align in (
        (
            frames,
            tmp_path / "short.npy",
            "length differs: REF has 12 frames, CAND has 9; pass --align length",
            "length",
        ),
        (video, fast, "frame rate differs: REF has 24 fps, CAND has 30 fps; pass --align time", "time"),
        (video, fast, "frame rate differs", "index"),
        (video, varying, r"REF has 24 fps, CAND has variable frame rate \(10.0 to 80.0 ms", "time"),
        (video, ten, r"pixel format differs: REF is \w+ \(8 bits\), CAND is yuv420p10le \(10 bits\)", "depth"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(ref, cand)
        assert checked(ref, cand, align)  # the option named says in a note what it did
    with pytest.raises(ValueError, match="size differs: REF is 80x64, CAND is 40x32; pass --resize"):
        checked(frames, tmp_path / "small.npy")
    assert checked(frames, tmp_path / "small.npy", resize=True) == ["CAND scaled from 40x32 to 80x64 (bicubic)"]
    with pytest.raises(ValueError, match=r"REF .* holds frames, CAND .* holds latents"):
        checked(frames, tmp_path / "latents.npy")
    with pytest.raises(ValueError, match="align='lenght' must be among length, index, time, depth"):
        parse_align("lenght")
    assert checked(varying, varying) == []  # the same irregular times are no mismatch


def test_hdr_transfer_against_sdr_is_refused(tmp_path):
    def encode(name, transfer):
        params = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
        return write_video(
            tmp_path / name, REF[:3], codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": params}
        )

    pq, sdr = encode("pq.mp4", "smpte2084"), encode("sdr.mp4", "bt2020-10")
    with pytest.raises(
        ValueError, match=r"REF is yuv420p10le \(10 bits, PQ \(SMPTE ST 2084\)\), CAND is yuv420p10le \(10 bits\)"
    ):
        checked(pq, sdr)


def test_pairing_by_time_takes_the_frame_shown_then(tmp_path):
    slow = write_video(tmp_path / "slow.mp4", REF[::2], fps=12)
    fast = write_video(tmp_path / "fast.mp4", REF, fps=24)
    result = compare_clips(open_clip(slow), open_clip(fast), align={"time"})
    assert (result.num_frames, result.first_different_frame) == (6, None)
    assert compare_clips(open_clip(slow), open_clip(fast), align={"index", "length"}).first_different_frame == 1
    back = compare_clips(open_clip(fast), open_clip(slow), align={"time"})
    assert back.num_frames == 12
    assert back.num_different_frames == 6  # every second frame has no partner of its own
