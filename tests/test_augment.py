"""Augmentation against plain NumPy in float64, and its promises: per-example keys, traced
strengths, free when off, any sharding.

B batch, H height, W width, L length, C channels.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import augment as augmentation
from jaxtrain import fields
from jaxtrain.augment import ImageAugment, NoAugment, SignalAugment, draws, mixup
from jaxtrain.train import hyper

BATCH, SIDES, LENGTH = 16, (6, 5), 20
KEYS = jax.random.split(jax.random.key(7), BATCH)
KEY = jax.random.key(8)
DRAWS = np.asarray(draws.uniform(KEYS), np.float64)
ALL_IMAGE = ImageAugment(
    flip=0.5, flip_vertical=0.5, crop_padding=2.0, translate=0.2, erase=0.5, mixup=0.4, cutmix=1.0
)
ALL_SIGNAL = SignalAugment(
    shift=0.3,
    stretch=0.1,
    warp=0.05,
    scale=0.2,
    shear=0.3,
    noise=0.1,
    smooth_noise=0.1,
    erase=0.5,
    mixup=0.4,
    cutmix=1.0,
)


def images() -> dict[str, jax.Array]:
    values = np.random.default_rng(0).normal(size=(BATCH, *SIDES, 2))
    return {"image": jnp.asarray(values, jnp.float32), "label": jnp.arange(BATCH, dtype=jnp.int32)}


def signals() -> dict[str, jax.Array]:
    values = np.random.default_rng(1).normal(size=(BATCH, LENGTH))
    return {"image": jnp.asarray(values, jnp.float32), "label": jnp.arange(BATCH, dtype=jnp.int32)}


def run(
    augment: augmentation.Augment, batch: dict[str, jax.Array], keys: int = 0
) -> dict[str, np.ndarray]:
    """What comes out for one key of the batch or, stacked, for several."""
    over_keys = jax.vmap(augment, in_axes=(None, None, 0)) if keys else augment
    return {
        name: np.asarray(value)
        for name, value in jax.jit(over_keys)(
            batch, KEYS, jax.random.split(KEY, keys) if keys else KEY
        ).items()
    }


def whole(draw: float, limit: int) -> int:
    return min(math.floor(draw * (2 * limit + 1)), 2 * limit) - limit


@functools.cache
def everything(kind: str) -> dict[str, np.ndarray]:
    return run(ALL_IMAGE, images()) if kind == "image" else run(ALL_SIGNAL, signals())


@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_crops_are_those_of_a_padded_image(padding: str) -> None:
    found = run(ImageAugment(crop_padding=2.0, padding=padding), images())["image"]
    mode = {"reflect": "reflect", "zero": "constant"}[padding]
    for image, out, row in zip(np.asarray(images()["image"]), found, DRAWS, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
        top, left = (2 + whole(draw, 2) for draw in row[draws.CROP])
        np.testing.assert_array_equal(out, padded[top : top + SIDES[0], left : left + SIDES[1]])


def test_flips_and_translations() -> None:
    found = run(ImageAugment(flip=0.5, flip_vertical=0.3, translate=0.4), images())["image"]
    for image, out, row in zip(np.asarray(images()["image"]), found, DRAWS, strict=True):
        down, right = (
            whole(draw, round(0.4 * side))
            for draw, side in zip(row[draws.TRANSLATE], SIDES, strict=True)
        )
        expected = np.pad(image, ((5, 5), (5, 5), (0, 0)))[
            5 + down : 5 + down + SIDES[0], 5 + right : 5 + right + SIDES[1]
        ]
        expected = expected[::-1] if row[draws.FLIP_VERTICAL] < 0.3 else expected
        expected = expected[:, ::-1] if row[draws.FLIP] < 0.5 else expected
        # The image is flipped after it was moved; a flipped move is as likely as the move itself.
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_reflection_of_any_reach(size: int) -> None:
    reach = 3 * size + 1 if size > 1 else 4
    expected = np.pad(np.arange(size), reach, mode="reflect")
    np.testing.assert_array_equal(
        augmentation.image._reflect(jnp.arange(-reach, size + reach), size), expected
    )


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_erasing_takes_one_rectangle(fill: str) -> None:
    before = np.asarray(images()["image"])
    found = run(ImageAugment(erase=0.6, erase_area=0.5, erase_fill=fill), images())["image"]
    for image, out, row in zip(before, found, DRAWS, strict=True):
        erased = (image != out).any(-1)
        if row[draws.ERASE] >= 0.6:
            assert not erased.any()
            continue
        area, aspect = (
            (0.02 + row[3] * 0.48) * math.prod(SIDES),
            math.exp((2 * row[4] - 1) * math.log(1 / 0.3)),
        )
        height, width = (
            min(round(math.sqrt(area * aspect)), SIDES[0]),
            min(round(math.sqrt(area / aspect)), SIDES[1]),
        )
        assert erased.sum() == height * width
        rows, columns = np.nonzero(erased)
        assert erased.sum() == 0 or (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
        assert fill == "noise" or not out[erased].any()


@pytest.mark.parametrize("make", [ImageAugment, SignalAugment])
def test_mixup_blends_with_the_mirrored_example(make: type) -> None:
    batch = images() if make is ImageAugment else signals()
    found = run(make(mixup=0.7), batch)
    image = np.asarray(batch["image"], np.float64)
    weight = float(found["label_weight"][0])
    assert 0 <= weight <= 1 and (found["label_weight"] == found["label_weight"][0]).all()
    np.testing.assert_array_equal(found["label_other"], np.asarray(batch["label"])[::-1])
    np.testing.assert_allclose(
        found["image"], weight * image + (1 - weight) * image[::-1], atol=1e-6
    )


@pytest.mark.parametrize("make", [ImageAugment, SignalAugment])
def test_cutmix_weighs_labels_by_what_remains(make: type) -> None:
    batch = images() if make is ImageAugment else signals()
    image = np.asarray(batch["image"])
    found = run(make(cutmix=1.0), batch, keys=4)
    from_other = found["image"] == image[::-1]
    np.testing.assert_array_equal(np.where(from_other, image[::-1], image), found["image"])
    share = from_other.reshape(4, BATCH, -1).mean(axis=-1)
    np.testing.assert_allclose(found["label_weight"], 1 - share, atol=1e-6)
    assert 0.05 < np.mean(share) < 0.6


def test_both_mixtures_take_turns() -> None:
    weights = run(ImageAugment(mixup=1.0, cutmix=1.0), images(), keys=8)["label_weight"]
    constant = (weights == weights[:, :1]).all(axis=1).tolist()
    assert any(constant) and not all(constant)


def test_mixing_weights_are_beta() -> None:
    weights = jax.vmap(lambda key: mixup._weight(key, 0.5))(jax.random.split(KEY, 2000))
    assert abs(float(weights.mean()) - 0.5) < 0.03
    assert abs(float(weights.var()) - 0.125) < 0.01


def test_a_circular_shift_is_a_roll() -> None:
    found = run(SignalAugment(shift=0.25), signals())["image"]
    for signal, out, row in zip(np.asarray(signals()["image"]), found, DRAWS, strict=True):
        np.testing.assert_array_equal(out, np.roll(signal, -whole(row[draws.TRANSLATE][0], 5)))


@pytest.mark.parametrize("fill", ["circular", "edge", "zero"])
def test_resampling_is_linear_interpolation(fill: str) -> None:
    found = run(SignalAugment(shift=0.1, stretch=0.3, warp=0.08, fill=fill), signals())["image"]
    grid = np.arange(LENGTH)
    for signal, out, row in zip(
        np.asarray(signals()["image"], np.float64), found, DRAWS, strict=True
    ):
        amplitudes, phases = (
            2 * row[draws.WARP][:3] - 1,
            2 * np.pi * row[draws.WARP][3:],
        )
        waves = sum(
            amplitudes[k] / (k + 1) * np.sin(2 * np.pi * (k + 1) * grid / LENGTH + phases[k])
            for k in range(3)
        ) / (11 / 6)
        time = (
            9.5 + (grid - 9.5) * np.exp((2 * row[draws.STRETCH] - 1) * 0.3) + 0.08 * LENGTH * waves
        )
        time = time + whole(row[draws.TRANSLATE][0], 2)
        if fill == "circular":
            expected = np.interp(time, grid, signal, period=LENGTH)
        elif fill == "edge":
            expected = np.interp(time, grid, signal)
        else:
            expected = np.interp(
                time, np.arange(-1, LENGTH + 1), np.pad(signal, 1), left=0, right=0
            )
        np.testing.assert_allclose(out, expected, atol=2e-5)


def test_the_strongest_warp_keeps_the_order_of_time() -> None:
    rows = jax.random.uniform(KEY, (1000, 6)).at[0].set(jnp.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5]))
    time = np.arange(200) + 0.09 * 200 * np.asarray(
        augmentation.signal._waves(rows, 200), np.float64
    )
    assert np.abs(np.asarray(augmentation.signal._waves(rows, 200))).max() <= 1
    assert (np.diff(time) > 0).all()


def test_scale_and_shear() -> None:
    found = run(SignalAugment(scale=0.4, shear=0.75), signals())["image"]
    scale, shear = (2 * DRAWS[:, place, None] - 1 for place in (draws.SCALE, draws.SHEAR))
    expected = np.asarray(signals()["image"], np.float64) * (
        1 + 0.4 * scale
    ) + 0.75 * shear * np.linspace(-1, 1, LENGTH)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "neighbours"), [("noise", 0.0), ("smooth_noise", math.exp(-1 / 16))]
)
def test_noise_has_its_deviation_and_correlation(field: str, neighbours: float) -> None:
    batch = {"image": jnp.zeros((BATCH, 800))}
    noise = np.asarray(SignalAugment(**{field: 0.5})(batch, KEYS, KEY)["image"], np.float64)
    assert abs(noise.std() - 0.5) < 0.02
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1]) / noise.var() - neighbours) < 0.03


def test_erased_spans() -> None:
    found = run(SignalAugment(erase=0.5, erase_length=0.5), signals())["image"]
    for out, row in zip(found, DRAWS, strict=True):
        expected = round(row[draws.AREA] * 0.5 * LENGTH) if row[draws.ERASE] < 0.5 else 0
        assert (out == 0).sum() == expected


@pytest.mark.parametrize("kind", ["image", "signal"])
def test_any_sharding_gives_the_same(kind: str) -> None:
    batch, augment = (images(), ALL_IMAGE) if kind == "image" else (signals(), ALL_SIGNAL)
    mesh = jax.make_mesh(
        (math.gcd(BATCH, jax.device_count()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rows, all_of_it = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for spec in (("data",), ())
    )
    sharded = jax.jit(augment, out_shardings=rows)(
        *jax.device_put((batch, KEYS), rows), jax.device_put(KEY, all_of_it)
    )
    for name, value in everything(kind).items():
        np.testing.assert_allclose(np.asarray(sharded[name]), value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["image", "signal"])
def test_an_example_is_the_same_in_any_microbatch(kind: str) -> None:
    batch, augment = (images(), ALL_IMAGE) if kind == "image" else (signals(), ALL_SIGNAL)
    augment = jax.jit(dataclasses.replace(augment, mixup=0.0, cutmix=0.0))
    halves = [
        augment(jax.tree.map(lambda rows, half=half: rows[half], batch), KEYS[half], KEY)
        for half in (slice(8), slice(8, 16))
    ]
    full = augment(batch, KEYS, KEY)
    np.testing.assert_allclose(
        np.concatenate([half["image"] for half in halves]), full["image"], atol=1e-6
    )


@pytest.mark.parametrize("kind", ["image", "signal"])
def test_strengths_are_inputs_of_the_program(kind: str) -> None:
    batch, augment = (images(), ALL_IMAGE) if kind == "image" else (signals(), ALL_SIGNAL)
    strengths = hyper.collect(augment, "augment")
    on = {f"augment.{field.name}" for field in fields.fields_of(augment) if field.traced}
    assert set(strengths) == on
    step = jax.jit(lambda values, batch: hyper.bind(augment, values, "augment")(batch, KEYS, KEY))
    found, nothing = step(strengths, batch), step(dict.fromkeys(strengths, 0.0), batch)
    assert step._cache_size() == 1
    for name, value in everything(kind).items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(nothing["image"], batch["image"], atol=1e-6)
    np.testing.assert_array_equal(nothing["label_weight"], np.ones(BATCH, np.float32))


@pytest.mark.parametrize("augment", [NoAugment(), ImageAugment(), SignalAugment()])
def test_what_is_off_costs_nothing(augment: augmentation.Augment) -> None:
    batch = signals() if isinstance(augment, SignalAugment) else images()
    program = (
        jax.jit(lambda batch, keys, key: augment(batch, keys, key))
        .lower(batch, KEYS, KEY)
        .compile()
    )
    assert not (program.cost_analysis() or {}).get("flops")
    for name, value in run(augment, batch).items():
        np.testing.assert_array_equal(value, batch[name])


def test_switching_one_effect_on_moves_no_other() -> None:
    crop = run(ImageAugment(crop_padding=1.0), images())["image"]
    both = run(ImageAugment(crop_padding=1.0, erase=1.0, erase_fill="zero"), images())["image"]
    np.testing.assert_array_equal(np.where(both == 0, crop, both), crop)


def test_half_precision_and_channels_stay() -> None:
    batch = {
        "image": jnp.ones((BATCH, LENGTH, 3), jnp.bfloat16),
        "label": jnp.zeros(BATCH, jnp.int32),
    }
    assert jax.eval_shape(ALL_SIGNAL, batch, KEYS, KEY)["image"].dtype == jnp.bfloat16
    batch["image"] = jnp.ones((BATCH, *SIDES, 3), jnp.bfloat16)
    assert jax.eval_shape(ALL_IMAGE, batch, KEYS, KEY)["image"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("augment", "batch", "message"),
    [
        (ImageAugment(), {"image": jnp.ones((2, 8))}, "take SignalAugment"),
        (SignalAugment(), {"image": jnp.ones((2, 8, 8, 1))}, "take --augment=image"),
        (
            ImageAugment(),
            {"image": jnp.ones((2, 8, 8, 1), jnp.uint8)},
            "uint8; expected standardized floats",
        ),
        (ImageAugment(mixup=1.0), {"image": jnp.ones((2, 8, 8, 1))}, "no label to mix"),
    ],
)
def test_unfit_batches_are_refused(
    augment: augmentation.Augment, batch: dict[str, jax.Array], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        augment(batch, KEYS[:2], KEY)


@pytest.mark.parametrize("name", augmentation.NAMES)
def test_named_augmentations_have_sound_fields(name: str) -> None:
    fields.check(augmentation.NAMES[name])
