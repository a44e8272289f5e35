"""Models in and out: reading, the weightless skeleton, writing.

Passes over a graph need the structure, not the weights. So the large initializers are set aside once
(``Source.weights``), and everything that copies or serialises a model (opset conversion, shape inference, checking)
works on a *skeleton* in which each of them is a typed input. That keeps rewriting in milliseconds and out of protobuf's
2 GiB limit.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx import external_data_helper, shape_inference

from onnx_lrp.errors import InputError, ModelError, one_line
from onnx_lrp.opsets import inlined, name_nodes, opset_of, to_working_opset
from onnx_lrp.order import bodies, by_depth

Shapes: TypeAlias = "Mapping[str, Sequence[int | None]]"
ModelLike: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto | gs.Graph"

_NEWEST_OPSET = 26  # the newest that ONNX Runtime 1.31 loads
_SMALL = 1024  # bytes; tensors up to this stay in the skeleton, because shapes may be computed from them
_PROTOBUF_LIMIT = 2**31 - 2**20
_PAGE = 4096  # bytes; what is mapped into memory begins at a multiple
ROLE = "onnx_lrp.role"  # metadata of a node in a body of ours: what the walk knows it as


@dataclass
class Source:
    """A model as the passes see it.

    Attributes:
        skeleton: the model at the working opset, each large initializer declared as an input instead.
        sha256: of the bytes that were given.
        name: file name or graph name, for messages.
        folder: where external data is looked up and models refer to it; None for models in memory.
        path: the file that the model can be read from again; None for models in memory and those with external data.
        constants: names of the large initializers.
        defaults: names of graph inputs that have a default value, so that they may be fed or not.
    """

    skeleton: onnx.ModelProto
    sha256: str
    name: str
    folder: Path | None
    path: Path | None
    constants: frozenset[str]
    defaults: set[str]
    _held: tuple[onnx.ModelProto, dict[str, onnx.TensorProto]] | None = field(repr=False)

    @property
    def opset(self) -> int:
        """Version of the ai.onnx operators in the skeleton."""
        return opset_of(self.skeleton)

    @property
    def original(self) -> onnx.ModelProto:
        """The model as given (opset untouched), for comparing outputs.

        Raises:
            ModelError: it was released, and its file is gone or another one.
        """
        return self._kept()[0]

    @property
    def weights(self) -> dict[str, onnx.TensorProto]:
        """The large initializers by name, in their order.

        Raises:
            ModelError: the model was released, and its file is gone or another one.
        """
        return self._kept()[1]

    def release(self) -> None:
        """Let the weights go where they can be read again, as they are when they are next asked for."""
        if self.path is not None:
            self._held = None

    def _kept(self) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
        if self._held is None:
            assert self.path is not None
            proto, name, _, digest = _read(self.path)
            if digest != self.sha256:
                raise ModelError(f"{name}: the file has changed since it was explained; explain it anew")
            _import_once(proto)
            self._held = proto, _split(proto)[1]
        return self._held


def load(model: ModelLike, shapes: Shapes | None = None) -> Source:
    """Read a model, bring it to the working opset and set its weights aside.

    Args:
        model: path of an .onnx file, its bytes, a ModelProto, or an onnx_graphsurgeon Graph. Never modified.
        shapes: lengths of inputs to take as fixed, by name; None for an axis that stays as it is.

    Returns:
        The source.

    Raises:
        InputError: shapes that are none of the model's.
        ModelError: unreadable, invalid, weights missing, external data outside the model's folder, opset too new.
    """
    proto, name, folder, digest = _read(model)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{name}: this is no ONNX model (it holds no graph); give a file written by an ONNX exporter")
    if any(p.key == "onnx_lrp" for p in proto.metadata_props):
        raise ModelError(f"{name}: this model already explains itself; give the model that it was made from")
    if not proto.graph.output:
        raise ModelError(f"{name}: the model has no output, so nothing to explain; export it again")
    version = opset_of(proto)
    if not version:
        raise ModelError(f"{name}: the model imports no ai.onnx opset; re-export it with a standard exporter")
    if version > _NEWEST_OPSET:
        raise ModelError(
            f"{name}: opset {version} is newer than {_NEWEST_OPSET}, the newest that ONNX Runtime loads; "
            f"export with opset_version={_NEWEST_OPSET} or lower"
        )
    _import_once(proto)
    external = _resolve_external(proto, name, folder)
    skeleton, weights, defaults = _split(proto)
    skeleton = to_working_opset(inlined(skeleton, name), name)
    name_nodes(skeleton.graph)
    _fix_lengths(skeleton.graph, shapes or {}, {i.name for i in skeleton.graph.input} - weights.keys())
    _check(skeleton, name)
    path = Path(model) if isinstance(model, str | os.PathLike) and not external else None
    return Source(skeleton, digest, name, folder, path, frozenset(weights), defaults, (proto, weights))


def _fix_lengths(graph: onnx.GraphProto, shapes: Shapes, inputs: Collection[str]) -> None:
    """Write the lengths of axes into the inputs."""
    for name, lengths in shapes.items():
        if name not in inputs:
            raise InputError(f"shapes: the model has no input '{name}'; inputs are {', '.join(sorted(inputs))}")
        tensor = next(i for i in graph.input if i.name == name).type.tensor_type
        axes = list(tensor.shape.dim)
        given = tuple("?" if n is None else n for n in lengths)
        if len(axes) != len(given) or any(
            n != "?" and d.HasField("dim_value") and d.dim_value != n for d, n in zip(axes, given, strict=True)
        ):
            own = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in axes)
            raise InputError(f"shapes: input '{name}' is of shape {own}, which cannot be {given}")
        for axis, length in zip(axes, lengths, strict=True):
            if length is not None:
                axis.dim_value = length


def _import_once(proto: onnx.ModelProto) -> None:
    """Some exporters import a domain twice: keep its newest version."""
    newest = {o.domain: o.version for o in sorted(proto.opset_import, key=lambda o: o.version)}
    if len(newest) < len(proto.opset_import):
        domains = dict.fromkeys(o.domain for o in proto.opset_import)
        del proto.opset_import[:]
        proto.opset_import.extend(onnx.helper.make_opsetid(domain, newest[domain]) for domain in domains)


def _read(model: ModelLike) -> tuple[onnx.ModelProto, str, Path | None, str]:
    if isinstance(model, gs.Graph):
        model = gs.export_onnx(model)
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy, model.graph.name or "model", None, _digest(_canonical_bytes(copy))
    if isinstance(model, bytes | bytearray | memoryview):
        data, name, folder = bytes(model), "model (bytes)", None
    elif isinstance(model, str | os.PathLike):
        path = Path(model)
        name, folder = str(path), path.parent
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{name}: cannot be read ({error.strerror or error}); check the path") from None
    else:
        raise ModelError(f"a model is a path, bytes, ModelProto or onnx_graphsurgeon.Graph, not {type(model).__name__}")
    try:
        proto = onnx.load_model_from_string(data)
    except (DecodeError, ValueError):
        raise ModelError(
            f"{name}: not an ONNX file, or cut short (its bytes do not parse); export or download it again"
        ) from None
    return proto, name, folder, _digest(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical_bytes(proto: onnx.ModelProto) -> bytes:
    # Above protobuf's limit the structure has to do.
    return serialized(proto) or serialized(_split(proto)[0]) or b""


def _resolve_external(proto: onnx.ModelProto, name: str, folder: Path | None) -> bool:
    """Load external tensors into the proto while it stays below protobuf's limit; else check the references only.

    Returns:
        Whether there are any.
    """
    graphs = (proto.graph, *proto.functions)
    tensors = [t for g in graphs for t in _all_tensors(g) if external_data_helper.uses_external_data(t)]
    if not tensors:
        return False
    if folder is None:
        raise ModelError(
            f"{name}: weights are external data, which a model in memory cannot find; give the model's path"
        )
    total = 0
    root = folder.resolve()
    for tensor in tensors:
        try:
            info = external_data_helper.ExternalDataInfo(tensor)
        except ValueError as error:
            raise ModelError(
                f"{name}: external data of '{tensor.name}' is malformed ({one_line(error)}); export it again"
            ) from None
        path = (root / info.location).resolve()
        if not path.is_relative_to(root):
            raise ModelError(
                f"{name}: external data '{info.location}' points outside the model's folder; move it beside the model"
            )
        if not path.is_file():
            raise ModelError(f"{name}: external data '{info.location}' is missing; put the file beside the model")
        size, wanted = path.stat().st_size, _bytes_of(tensor)
        if (info.offset or 0) + max(info.length or 0, wanted) > size:
            raise ModelError(f"{name}: external data '{info.location}' is cut short ({size} bytes); copy it again")
        total += info.length or size
    if total + proto.ByteSize() < _PROTOBUF_LIMIT:
        for tensor in tensors:
            try:
                external_data_helper.load_external_data_for_tensor(tensor, str(root))
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise ModelError(
                    f"{name}: external data of '{tensor.name}' cannot be read ({one_line(error)}); copy it again"
                ) from None
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return True


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes that the elements of a tensor take, by its shape; 0 for types that numpy does not have."""
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, TypeError, ValueError):
        return 0
    return int(dtype.itemsize) * math.prod(tensor.dims) if dtype.kind in "fiub" else 0


def array_of(tensor: onnx.TensorProto) -> Any:
    """The elements of a constant.

    Raises:
        ModelError: they are fewer than its shape says.
    """
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (TypeError, ValueError) as error:
        raise ModelError(f"weights '{tensor.name}' are damaged ({one_line(error)}); export the model again") from None


def _all_tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterable[onnx.TensorProto]:
    """Constants of a graph and of the graphs inside its nodes."""
    yield from getattr(graph, "initializer", ())
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in bodies(node):
            yield from _all_tensors(inner)


def _split(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto], set[str]]:
    """A model without its large initializers (declared as inputs instead), those, and which of all can be fed."""
    weights: dict[str, onnx.TensorProto] = {}
    skeleton = _without_initializers(proto)
    declared = {i.name for i in proto.graph.input}
    # Below IR 4 every initializer has to be listed among the inputs, yet runtimes treat it as a constant.
    listed_by_force = proto.ir_version < 4
    constants = {t.name for t in proto.graph.initializer} if listed_by_force else set()
    defaults = set() if listed_by_force else declared & {t.name for t in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        # Counted from the shape: asking a tensor for its byte size takes as long as reading it.
        if 8 * math.prod(tensor.dims) <= _SMALL:
            skeleton.graph.initializer.append(tensor)
        else:
            weights[tensor.name] = tensor
            if tensor.name not in declared:
                skeleton.graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                )
    if listed_by_force and proto.ir_version:
        small = constants - weights.keys()
        kept = [i for i in skeleton.graph.input if i.name not in small]
        del skeleton.graph.input[:]
        skeleton.graph.input.extend(kept)
        skeleton.ir_version = 4
    return skeleton, weights, defaults


def _without_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name != "graph":
            _copy_field(copy, descriptor.name, value)
    for descriptor, value in proto.graph.ListFields():
        if descriptor.name != "initializer":
            _copy_field(copy.graph, descriptor.name, value)
    return copy


def _copy_field(target: Any, name: str, value: Any) -> None:
    field_ = getattr(target, name)
    if hasattr(field_, "extend"):
        field_.extend(value)
    elif hasattr(field_, "CopyFrom"):
        field_.CopyFrom(value)
    else:
        setattr(target, name, value)


def _check(skeleton: onnx.ModelProto, name: str) -> None:
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{name}: not a valid ONNX model ({one_line(error)}); check how it was exported") from None


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values: text, numbers, lists, arrays, graphs."""
    attrs: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif isinstance(value, onnx.TensorProto):
            value = array_of(value)
        elif attribute.strings:
            value = [text.decode(errors="replace") for text in value]
        attrs[attribute.name] = list(value) if attribute.ints or attribute.floats else value
    return attrs


def inferred_graph(source: Source) -> onnx.GraphProto:
    """The skeleton with inferred shapes (a copy: the source is not touched)."""
    try:
        return shape_inference.infer_shapes(source.skeleton, strict_mode=False, data_prop=True).graph
    except Exception as error:  # inference raises several unrelated types
        raise ModelError(
            f"{source.name}: shape inference fails ({one_line(error)}); check how it was exported"
        ) from None


def assemble(source: Source, added: onnx.GraphProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """The explained model: as :func:`assemble_bare`, and the source's weights.

    Args:
        source: the source.
        added: nodes, initializers, inputs and outputs to append.
        metadata: metadata_props to set on the model.

    Returns:
        A new model, checked.
    """
    return with_weights(assemble_bare(source, added, metadata), source)


def with_weights(bare: onnx.ModelProto, source: Source | None) -> onnx.ModelProto:
    """A copy of a model that holds the source's weights, too; without a source the model itself."""
    if source is None:
        return bare
    model = onnx.ModelProto()
    model.CopyFrom(bare)
    model.graph.initializer.extend(source.weights.values())
    return model


def assemble_bare(
    source: Source,
    added: onnx.GraphProto,
    metadata: dict[str, str],
    arrange: Callable[[onnx.ModelProto], None] = lambda model: None,
) -> onnx.ModelProto:
    """The explained model without weights: the source's own nodes byte for byte, then what was added.

    Args:
        source: the source.
        added: nodes, initializers, inputs and outputs to append.
        metadata: metadata_props to set on the model.
        arrange: rearranges the nodes of the finished model in place.

    Returns:
        A new model, checked; what the source's weights are called is read in it and made nowhere.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source.skeleton)
    graph = model.graph
    graph.node.extend(by_depth(added.node, source.skeleton.graph.node))
    graph.initializer.extend(added.initializer)
    graph.input.extend(added.input)
    graph.output.extend(added.output)
    for key, value in metadata.items():
        entry = next((p for p in model.metadata_props if p.key == key), None) or model.metadata_props.add(key=key)
        entry.value = value
    arrange(model)
    _check(model, source.name)
    kept = [i for i in graph.input if i.name not in source.constants or i.name in source.defaults]
    del graph.input[:]
    graph.input.extend(kept)
    return model


def to_graphsurgeon(model: onnx.ModelProto) -> gs.Graph:
    """A model as an onnx_graphsurgeon Graph."""
    return gs.import_onnx(model)


def save(model: onnx.ModelProto, path: str | os.PathLike[str], folder: Path | None = None) -> None:
    """Write a model under a temporary name and rename it; weights go beside it where protobuf's limit demands it.

    Args:
        model: the model.
        path: where to.
        folder: where external data that the model refers to lies.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    try:
        if any(external_data_helper.uses_external_data(t) for t in model.graph.initializer):
            _bring_external(model, path, folder or path.parent)
        data = serialized(model)
        if data is None:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            beside = path.name + ".data"
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as inside:
                onnx.save_model(copy, Path(inside) / path.name, save_as_external_data=True, location=beside)
                for name in (beside, path.name):
                    os.replace(Path(inside) / name, path.parent / name)
        else:
            write_atomically(path, data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder and the free space"
        ) from None


def _bring_external(model: onnx.ModelProto, path: Path, folder: Path) -> None:
    """Make the data files that the model refers to present beside the output, by hard link where possible."""
    locations = {external_data_helper.ExternalDataInfo(t).location for t in model.graph.initializer if t.external_data}
    for location in sorted(locations):
        target, origin = path.parent / location, folder / location
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(origin, target)
        except OSError:
            with origin.open("rb") as file:
                write_atomically(target, file.read())


def write_apart(model: onnx.ModelProto, constants: Iterable[onnx.TensorProto], folder: Path) -> Path:
    """Write a model that a runtime is to load, its weights in a file of their own, which can be mapped into memory.

    Args:
        model: the model.
        constants: all its initializers, be they in it or not.
        folder: where to.

    Returns:
        The path of the model.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    referring, location = _without_initializers(model), "weights"
    with (folder / location).open("wb") as file:
        for tensor in constants:
            data = tensor.raw_data or (array_of(tensor).tobytes() if _bytes_of(tensor) else b"")
            if len(data) <= _SMALL:
                referring.graph.initializer.append(tensor)
                continue
            offset = -(-file.tell() // _PAGE) * _PAGE
            file.seek(offset)
            file.write(data)
            entry = referring.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offset), ("length", len(data))):
                entry.external_data.add(key=key, value=str(value))
    path = folder / "model.onnx"
    path.write_bytes(referring.SerializeToString())
    return path


def bytes_of(tensors: Iterable[onnx.TensorProto]) -> int:
    """Bytes that the elements of tensors take, by their shapes."""
    return sum(map(_bytes_of, tensors))


def bytes_on_disk(path: Path, folder: Path | None = None) -> int:
    """Bytes of a model's file and of its external data, which lies in `folder` where it is not beside the file."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    used = [external_data_helper.ExternalDataInfo(t) for t in tensors if external_data_helper.uses_external_data(t)]
    beside = {
        path.parent / name if (path.parent / name).exists() else (folder or path.parent) / name
        for name in {info.location for info in used}
    }
    return path.stat().st_size + sum(file.stat().st_size for file in beside)


def serialized(model: onnx.ModelProto) -> bytes | None:
    """The model's bytes; None above what protobuf serialises."""
    try:
        data = bytes(model.SerializeToString(deterministic=True))
    except (ValueError, EncodeError):
        return None
    return data if len(data) < _PROTOBUF_LIMIT else None


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes under a temporary name in the same folder, then rename: a reader never sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
