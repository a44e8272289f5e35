"""Options that several commands share, and what their text means."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrp.cli.sources import is_text
from onnx_lrp.errors import InputError, OnnxLrpError
from onnx_lrp.inputs import Item, fit, read_input
from onnx_lrp.model import Source
from onnx_lrp.preprocess import IMAGE_SUFFIXES, PRESETS, Color, Layout, Preprocess, Resize, from_options
from onnx_lrp.roles import Spec, kinds, role_of, text_inputs
from onnx_lrp.target import STARTS
from onnx_lrp.tokenizer import Tokenizer

_LOG = logging.getLogger("onnx_lrp")
_PIXELS = ("size", "mean", "std", "scale", "layout", "color", "resize")

Names = Sequence[str] | Tokenizer | None  # of classes; a tokenizer where they are its tokens
Commands = Any  # argparse's own type for what add_subparsers returns is private


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    """Add a command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


def add_rewriting(
    parser: argparse.ArgumentParser, *, several_methods: bool = False, choose_inputs: bool = True, layers: bool = True
) -> None:
    """The model, the method, and what rewriting leaves open."""
    parser.add_argument("model", metavar="MODEL", help="an .onnx file")
    what = "name of a method (see onnx-lrp methods) or path of a rule book (.toml); default epsilon_plus_flat"
    what += "; parameters follow a colon, as in integrated_gradients:steps=100"
    if several_methods:
        parser.add_argument("-m", "--method", action="append", help=what + "; repeat it to compare")
    else:
        parser.add_argument("-m", "--method", default="epsilon_plus_flat", help=what)
    more = parser.add_argument_group("what is explained")
    if choose_inputs:
        about = "report relevance for this input only; may be repeated"
        more.add_argument("--input", action="append", metavar="TENSOR", help=about)
    if layers:
        about = "report this inner tensor, too; may be repeated"
        more.add_argument("--layer", "--layers", action="append", default=[], metavar="TENSOR", help=about)
        about = "write the value of this inner tensor, too, such as an attention map; may be repeated"
        more.add_argument("--value", action="append", default=[], metavar="TENSOR", help=about)
    more.add_argument(
        "--output", metavar="TENSOR", help="the explained tensor; default: the first output, before its softmax"
    )
    about = "take lengths of an input as fixed, such as input:1,576, or input:?,576 to leave one as it is"
    more.add_argument("--shape", action="append", default=[], type=_shape, metavar="NAME:LENGTHS", help=about)
    more.add_argument("--start", choices=STARTS, help="what relevance begins with")
    more.add_argument("--allow-gradient", action="store_true", help="nodes without a rule take the plain gradient")
    more.add_argument("--no-fold-batchnorm", action="store_true", help="batch normalisation is a layer of its own")


def rewriting(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `rewrite` that `add_rewriting` asks for."""
    chosen = {"inputs": args.input} if getattr(args, "input", None) else {}
    return {
        **chosen,
        "layers": layer if isinstance(layer := getattr(args, "layer", None), list) else [],
        "values": getattr(args, "value", []),
        "shapes": dict(args.shape),
        "output": args.output,
        "start": args.start,
        "allow_gradient": args.allow_gradient,
        "fold_batchnorm": False if args.no_fold_batchnorm else None,
    }


def add_masks(parser: argparse.ArgumentParser) -> None:
    """Relevance conditional on channels."""
    about = "add an input 'mask/TENSOR', which says which channels of it count; may be repeated"
    parser.add_argument("--mask", action="append", default=[], metavar="TENSOR", help=about)
    keep_parallel(parser)


def keep_parallel(parser: argparse.ArgumentParser) -> None:
    """Whether paths around a masked tensor count."""
    about = "count what passes around the masked tensors, too, as through a shortcut"
    parser.add_argument("--keep-parallel", action="store_true", help=about)


def masking(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `rewrite` that `add_masks` asks for."""
    return {"masks": args.mask, "exclude_parallel": not args.keep_parallel}


def add_maps(parser: argparse.ArgumentParser, colormap: str = "diverging") -> None:
    """The colours of maps, and the range of the inputs."""
    about = f"such as diverging, hot, bwr; rgb: every channel of a picture in its colour; default {colormap}"
    parser.add_argument("--colormap", default=colormap, help=about)
    add_range(parser)


def add_range(parser: argparse.ArgumentParser) -> None:
    """The range of the inputs, which the z-box rule wants."""
    parser.add_argument("--low", help="least value of the inputs, for the z-box rule; pictures know theirs")
    parser.add_argument("--high", help="greatest value likewise")


def add_running(parser: argparse.ArgumentParser, *, batches: bool = False) -> Any:
    """Where and how a model runs, and in batches of how many samples; the group, to which more may be added."""
    group = parser.add_argument_group("running")
    if batches:
        about = "samples per run; default 4 on a CPU, 32 on a GPU"
        group.add_argument("--batch-size", type=_count, metavar="N", help=about)
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where it loads")
    group.add_argument("--threads", type=_count, metavar="N", help="threads per operator")
    return group


def add_text(parser: argparse.ArgumentParser) -> None:
    """How texts become token ids, and which of their positions are explained."""
    group = parser.add_argument_group("texts")
    about = "tokenizer.json of the model, or its folder; default: the one beside the model, where texts are given"
    group.add_argument("--tokenizer", metavar="FILE", help=about)
    about = "cut longer texts; default: as the tokenizer says"
    group.add_argument("--max-tokens", type=_count, metavar="N", help=about)
    about = (
        "where the output has classes for every token: last, mask (the hidden word), all, a number (below 0 from the"
    )
    about += " end), or A,B,...; default for language models: the mask, else the last"
    group.add_argument("--position", type=_position, metavar="P", help=about)
    about = "a text that goes with every picture, for models that take both, such as a question"
    group.add_argument("--text", metavar="TEXT", help=about)
    group.add_argument("--words", action="store_true", help="pictures show words instead of pieces of words")


def _position(text: str) -> str | int | list[int]:
    if text in ("auto", "last", "mask", "all"):
        return text
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not last, mask, all, a number, or numbers such as 3,5") from None
    return numbers[0] if len(numbers) == 1 else numbers


def tokenizer_of(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer that was asked for, or, where an input is none of the files there are, the one beside the model.

    Raises:
        InputError: it cannot be read.
    """
    path = args.tokenizer
    if path is None:
        beside = Path(args.model).parent / "tokenizer.json"
        texts = args.text is not None or any(s.lower().endswith(".txt") or is_text(s) for s in args.sources)
        if not texts or not beside.is_file():
            return None
        path = beside
    return Tokenizer(path, limit=args.max_tokens)


def add_pixels(parser: argparse.ArgumentParser) -> None:
    """How pictures become numbers."""
    group = parser.add_argument_group(
        "pictures", "Default: the model's metadata 'preprocess', else imagenet for three channels."
    )
    group.add_argument("--preprocess", choices=list(PRESETS), metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    group.add_argument("--size", help="pixels, such as 224 or 240x320 (height x width)")
    group.add_argument("--mean", help="one number or one per channel, such as 0.5,0.5,0.5")
    group.add_argument("--std", help="likewise")
    group.add_argument("--scale", help="pixels 0..255 are divided by it before mean and std")
    group.add_argument("--layout", type=str.upper, choices=get_args(Layout), help="order of the model's axes")
    group.add_argument("--color", type=str.upper, choices=get_args(Color), help="order of the model's channels")
    group.add_argument("--resize", choices=get_args(Resize), help="how a picture comes to its size; default crop")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


count = _count


def _shape(text: str) -> tuple[str, tuple[int | None, ...]]:
    name, _, lengths = text.rpartition(":")
    try:
        return name, tuple(None if n.strip() == "?" else _count(n) for n in lengths.split(",")) if name else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as input:1,3,224,224") from None


def numbers(name: str, text: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """One number, or one per channel, in the shape in which the model broadcasts it.

    Raises:
        InputError: no numbers, or not as many as channels.
    """
    try:
        values = np.array([float(v) for v in text.split(",")], np.float32)
    except ValueError:
        raise InputError(f"--{name} {text!r} is no number, nor one per channel such as -2.1,-2.0,-1.8") from None
    if len(values) > 1 and len(values) != np.prod(shape):
        raise InputError(f"--{name} has {len(values)} numbers; give one, or one per channel")
    return values.reshape(shape) if len(values) > 1 else values.reshape((1,) * len(shape))


# ---- metadata ----------------------------------------------------------------------------------------------------


def wanted_inputs(source: Source) -> dict[str, Spec]:
    """What has to be fed, by name."""
    found = {}
    for info in source.skeleton.graph.input:
        tensor = info.type.tensor_type
        if info.name not in source.constants and info.name not in source.defaults:
            dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
            found[info.name] = Spec(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or 1), dims)
    return found


def metadata(model: onnx.ModelProto, key: str) -> Any:
    """What a model says about itself as JSON; None where it says nothing, or nothing that can be read."""
    text = next((p.value for p in model.metadata_props if p.key == key), None)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        _LOG.warning("the model's metadata '%s' is no JSON, and is not used", key)
        return None


def picture_input(inputs: Mapping[str, Spec]) -> str:
    """The input that pictures go to: the only one, or the only one with four axes.

    Raises:
        InputError: there are several, or none.
    """
    found = list(inputs) if len(inputs) == 1 else [name for name, spec in inputs.items() if len(spec.shape) == 4]
    if len(found) != 1:
        raise InputError(f"none or several of the inputs ({', '.join(inputs)}) could be a picture; give .npz")
    return found[0]


def preprocessing(args: argparse.Namespace, source: Source) -> tuple[Preprocess, str]:
    """How pictures are prepared, and who says so.

    Options come first; without a preset among them, what they leave open comes from the model's metadata.

    Raises:
        InputError: the model takes no single picture, or the options do not fit it.
    """
    inputs = wanted_inputs(source)
    if len(inputs) != 1 and getattr(args, "text", None) is None:
        raise InputError(
            f"the model has {len(inputs)} inputs ({', '.join(inputs)}), so takes no picture alone; give .npz, or, "
            "where the others take a text, --text TEXT"
        )
    wanted = inputs[picture_input(inputs)]
    shape = wanted.shape
    asked = {key: getattr(args, key) for key in _PIXELS if getattr(args, key) is not None}
    if args.preprocess is not None:
        return from_options(args.preprocess, **asked, input_shape=shape), "as asked"
    said = metadata(source.skeleton, "preprocess")
    if said is not None:
        try:
            settings: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in said.items() if v is not None
            }
            preset = settings.pop("preset", None)
            return from_options(preset, **(settings | asked), input_shape=shape), "from the model's metadata"
        except (AttributeError, TypeError, OnnxLrpError) as error:
            if asked:
                raise InputError(f"the model's metadata 'preprocess' and the options do not fit ({error})") from None
            _LOG.warning("the model's metadata 'preprocess' is not understood (%s), and is not used", error)
    pre = from_options("raw" if wanted.dtype.kind in "iu" and not asked else None, **asked, input_shape=shape)
    if asked.keys() & {"mean", "std", "scale"}:
        return pre, "as asked"
    return pre, "assumed; if the model was trained otherwise, say --preprocess, --mean, --std, --scale"


def read_labels(path: str | None) -> list[str] | None:
    """Class names from a file: one per line, or JSON: a list, or number to name.

    Raises:
        InputError: unreadable, or not of this form.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
    except OSError as error:
        raise InputError(f"{path}: labels cannot be read ({error.strerror or error}); check the path") from None
    except ValueError:
        raise InputError(f"{path}: labels are text, one per line, or a JSON list; this file is neither") from None
    names = _names(content)
    if not names:
        raise InputError(f"{path}: labels are one name per line, a JSON list, or JSON number to name")
    return names


def _names(content: Any) -> list[str]:
    """Class names by number; empty where the content is none."""
    if isinstance(content, Mapping):
        try:
            places = {int(k): v for k, v in content.items()}
        except ValueError:
            places = {v: k for k, v in content.items()} if all(type(v) is int for v in content.values()) else {}
        if not places or min(places) < 0 or max(places) > 10 * len(places) + 1000:
            return []
        content = [places.get(i, f"class {i}") for i in range(max(places) + 1)]
    if not isinstance(content, list):
        return []
    # Keras lists ["n02123045", "tabby"]: the last one is for people.
    items = [item[-1] if isinstance(item, list) and item else item for item in content]
    if not all(isinstance(item, str | int) for item in items):
        return []
    while items and not str(items[-1]).strip():
        items.pop()
    return [" ".join(str(item).split()) for item in items]


def class_names(path: str | None, source: Source, classes: int | None) -> list[str] | None:
    """Class names from --labels, else from the model's metadata.

    Raises:
        InputError: their number is not that of the classes.
    """
    names = read_labels(path)
    if names is None:
        names = _names(metadata(source.skeleton, "classes"))
        if names and classes not in (None, len(names)):
            _LOG.warning(
                "the model's metadata 'classes' has %d names, its output %d classes; it is not used",
                len(names),
                classes,
            )
            names = []
        return names or None
    if classes == len(names) + 1:
        _LOG.warning("%s has %d names, the model %d classes: class 0 is taken as background", path, len(names), classes)
        return ["background", *names]
    if classes not in (None, len(names)):
        raise InputError(f"{path}: {len(names)} names for {classes} classes; give one per class")
    return names


def class_number(text: str, names: Names) -> int:
    """A class by its number, its name, or one of several names that commas part; a token by its text, perhaps quoted.

    Raises:
        InputError: no such class, or more than one.
    """
    word = text.strip()
    if re.fullmatch(r"[+-]?\d{1,18}", word):
        return int(word)
    if isinstance(names, Tokenizer):
        quoted = re.fullmatch(r'"(.+)"|\u201c(.+)\u201d', text.strip())
        return names.number(quoted[1] or quoted[2] if quoted else text)
    if names is None:
        raise InputError(f"class {word!r} is no number, and the model has no class names; give --labels FILE")
    wanted = word.lower()
    found = [i for i, n in enumerate(names) if n.lower() == wanted]
    found = found or [i for i, n in enumerate(names) if wanted in (part.strip().lower() for part in n.split(","))]
    if len(found) != 1:
        near = [n for n in names if wanted and wanted in n.lower()][:5]
        hint = f"; there is {', '.join(near)}" if near else f"; there are {len(names)}, such as {names[0]}"
        raise InputError(f"{'several classes are' if found else 'no class is'} called {word!r}{hint}")
    return found[0]


def has_pictures(paths: Sequence[Path]) -> bool:
    """Whether any input is an image."""
    return any(p.suffix.lower() in IMAGE_SUFFIXES for p in paths)


def feeds_of(path: Path, pre: Preprocess | None, inputs: Mapping[str, Spec]) -> tuple[Item, dict[str, Any]]:
    """One file as read, and as arrays by input name that have all their axes."""
    item = read_input(path, pre)
    arrays = item.arrays
    if not isinstance(arrays, dict):
        ids = text_inputs(kinds(inputs))
        if len(inputs) != 1 and (len(ids) != 1 or not all(role_of(n, *kind) for n, kind in kinds(inputs).items())):
            raise InputError(
                f"{path}: the model has {len(inputs)} inputs ({', '.join(inputs)}); give .npz with these names"
            )
        arrays = {ids[0].ids if ids else next(iter(inputs)): arrays}
    return item, {k: fit(np.asarray(v), inputs[k].shape) if k in inputs else v for k, v in arrays.items()}
