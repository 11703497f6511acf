"""The catalogue and backbone that a benchmark trains on: named on the command line, or generated for --quick."""

import argparse
from pathlib import Path

from distributed_rerank.config.extractor import ExtractorConfig, parse_named_values
from distributed_rerank.demo.catalogue import write_demo_catalogue


def add_catalogue_flags(parser: argparse.ArgumentParser) -> None:
    """Which images, which backbone, and where results stay."""
    parser.add_argument("--catalogue", help="table with the splits train and validation; needed unless --quick")
    parser.add_argument("--extractor", default="mobilenetv2_100")
    parser.add_argument("--extractor-weights", help="file; none = untrained; default: timm's from the hub")
    parser.add_argument("--extractor-args", nargs="*", default=())
    parser.add_argument("--image-size", type=int, help="default: timm's")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="default: timm's")
    parser.add_argument("--mean", type=float, nargs=3, help="default: timm's")
    parser.add_argument("--std", type=float, nargs=3, help="default: timm's")
    parser.add_argument("--out", type=Path, help="keep models and evaluations there; default: a folder that is removed")


def parse_with_catalogue(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; one without a catalogue ends the program, unless --quick generates one."""
    arguments = parser.parse_args()
    if not arguments.quick and arguments.catalogue is None:
        parser.error("--catalogue is needed (or --quick, which generates one)")
    return arguments


def generate_quick_catalogue(arguments: argparse.Namespace, work: Path) -> None:
    """Puts a small generated catalogue and an untrained small backbone in place of the named ones."""
    arguments.catalogue = str(write_demo_catalogue(work / "catalogue", n_designs=48, n_images=3, size=48))
    arguments.extractor, arguments.extractor_weights, arguments.image_size = "test_resnet", "none", 64


def extractor_of(arguments: argparse.Namespace) -> ExtractorConfig:
    """The backbone, fed with the whole image squashed."""
    return ExtractorConfig(
        name=arguments.extractor,
        weights=arguments.extractor_weights,
        args=parse_named_values(arguments.extractor_args),
        image_size=arguments.image_size,
        resize="square",
        interpolation=arguments.interpolation,
        mean=arguments.mean and tuple(arguments.mean),
        std=arguments.std and tuple(arguments.std),
    )
