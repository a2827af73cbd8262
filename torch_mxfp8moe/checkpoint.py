"""Reads experts from checkpoint folders of safetensors files, MXFP8 in every published form or high-precision.

A folder holds config.json and model.safetensors, or several files and model.safetensors.index.json. Needs the package
safetensors (the extra ``checkpoint``), which is imported when a folder is opened. Sizes as in :mod:`.experts`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .experts import Mxfp8Experts, SharedExpert, check_source
from .formats import BLOCK
from .ops import quantize_1x32

__all__ = ["Checkpoint", "CheckpointError", "FORMS", "Form", "load_experts", "show_progress"]


@dataclass(frozen=True)
class Form:
    """A published form of MXFP8 checkpoints: ``<module>.weight`` e4m3fn [out, in] beside scale bytes [out, in / 32]."""

    name: str
    scale: str
    """What the scale tensors end with, after the module's name."""
    recognise: Callable[[dict], bool]
    """Whether a quantization_config is of this form."""
    config: Callable[[list[str]], dict]
    """The quantization_config of a checkpoint in which these modules are not quantised."""


def _compressed_tensors_config(ignored: list[str]) -> dict:
    numbers = dict(num_bits=8, type="float", strategy="group", group_size=BLOCK, symmetric=True)
    group = dict(
        targets=["Linear"],
        format="mxfp8-quantized",
        weights=numbers | dict(dynamic=False, scale_dtype="torch.uint8"),
        input_activations=numbers | dict(dynamic=True, scale_dtype="torch.uint8"),
    )
    return dict(
        quant_method="compressed-tensors",
        format="mxfp8-quantized",
        quantization_status="compressed",
        config_groups=dict(group_0=group),
        ignore=ignored,
    )


def _entries(value: object) -> dict:
    """An object of a quantization_config; empty for what another format has in its place, such as a preset's name."""
    return value if isinstance(value, dict) else {}


def _is_compressed_tensors(config: dict) -> bool:
    groups = _entries(config.get("config_groups")).values()
    formats = [config.get("format"), *(_entries(group).get("format") for group in groups)]
    return config.get("quant_method") == "compressed-tensors" and "mxfp8-quantized" in formats


def _is_quark(config: dict) -> bool:
    weight = _entries(config.get("global_quant_config")).get("weight")
    weight = _entries(weight[0] if isinstance(weight, list) and weight else weight)
    wants = dict(dtype="fp8_e4m3", qscheme="per_group", group_size=BLOCK, scale_format="e8m0")
    return config.get("quant_method") == "quark" and all(weight.get(key) == value for key, value in wants.items())


def _quark_config(ignored: list[str]) -> dict:
    numbers = dict(dtype="fp8_e4m3", qscheme="per_group", group_size=BLOCK, ch_axis=-1, scale_format="e8m0",
                   symmetric=True, round_method="half_even")  # fmt: skip
    return dict(
        quant_method="quark",
        global_quant_config=dict(
            weight=numbers | dict(is_dynamic=False),
            input_tensors=numbers | dict(is_dynamic=True),
            output_tensors=None,
            bias=None,
        ),
        layer_quant_config={},
        exclude=ignored,
        export=dict(weight_format="real_quantized", pack_method="order"),
    )


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        # MiniMaxAI/MiniMax-M3-MXFP8 and tencent's Hy4-preview-FP8.
        Form(
            "mxfp8",
            "weight_scale_inv",
            lambda config: config.get("quant_method") == "mxfp8",
            lambda ignored: dict(
                quant_method="mxfp8",
                activation_scheme="dynamic",
                weight_block_size=[1, BLOCK],
                scale_fmt="ue8m0",
                ignored_layers=ignored,
            ),
        ),
        # https://github.com/NVIDIA/Model-Optimizer/pull/736
        Form(
            "modelopt",
            "weight_scale",
            lambda config: config.get("quant_method", "modelopt") == "modelopt" and config.get("quant_algo") == "MXFP8",
            lambda ignored: dict(
                quant_method="modelopt",
                quant_algo="MXFP8",
                group_size=BLOCK,
                kv_cache_quant_algo=None,
                exclude_modules=ignored,
                ignore=ignored,
            ),
        ),
        # https://github.com/vllm-project/compressed-tensors
        Form("compressed-tensors", "weight_scale", _is_compressed_tensors, _compressed_tensors_config),
        # https://github.com/amd/Quark
        Form("quark", "weight_scale", _is_quark, _quark_config),
    )
}
"""Every form by name."""

MATRICES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
"""Names of an expert's matrices: Qwen3-MoE, DeepSeek, GLM, Hunyuan; then Mixtral and MiniMax."""

_NAMES = "|".join(MATRICES)
_EXPERT = re.compile(rf"(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<matrix>{_NAMES})\.weight")
_STACKED = re.compile(r"(?P<layer>.+)\.experts\.(?P<matrix>gate_up_proj|down_proj)(?P<weight>\.weight)?")
_SHARED = re.compile(rf"(?P<layer>.+)\.shared_experts\.(?P<matrix>{_NAMES})\.weight")

_HIGH_PRECISION = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SCALES = ("U8", "F8_E8M0")

INDEX = "model.safetensors.index.json"
"""Which file has a tensor, in a folder of several."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of config.json, of which a family has one, for how many experts a layer has."""


class CheckpointError(ValueError):
    """A checkpoint is not what it has to be; names the file, the tensor and what was expected."""


def expert_of(name: str) -> re.Match | None:
    """``layer``, ``expert`` and ``matrix`` of the name of one routed expert's weight; None for any other tensor."""
    return _EXPERT.fullmatch(name)


def stacked_of(name: str) -> re.Match | None:
    """``layer`` and ``matrix`` of the name of a tensor that holds all experts' weights; None for any other."""
    return _STACKED.fullmatch(name)


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def show_progress(done: int, total: int, what: str) -> None:
    """One line on a terminal's stderr, rewritten; nothing elsewhere."""
    if sys.stderr.isatty():
        width = 30 * done // max(total, 1)
        end = "\n" if done == total else ""
        print(f"\r\033[K[{'#' * width:<30}] {done}/{total} {what}", end=end, file=sys.stderr, flush=True)


def _object(value: object, what: str) -> dict:
    """A value of JSON, which has to be an object."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}; expected a JSON object")
    return value


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{path} is missing; a checkpoint folder has one") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    return _object(value, f"{path} is a {type(value).__name__}")


class Checkpoint:
    """A checkpoint folder: its ``config``, its ``form``, and which ``layers`` have experts. Reads no weights yet.

    >>> with Checkpoint(folder) as checkpoint:
    ...     for layer, experts in checkpoint.experts(device="cuda", tp_rank=rank, tp_size=8):
    ...         model.get_submodule(layer).experts = experts

    Args:
        folder: with config.json.

    Raises:
        CheckpointError: a file is missing or truncated, or the quantization_config is of no known form.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.form = self._form()
        """None for a checkpoint that is not quantised."""
        self._open_files = {}
        self.files = self._files()
        """The file of every tensor."""
        self.layers = self._layers()
        """The modules that hold experts, such as ``model.layers.0.mlp``, in order: how many experts each has."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception) -> None:
        self._open_files.clear()

    def _text(self) -> dict:
        """What config.json has for the language model alone."""
        text = self.config.get("text_config") or {}
        return _object(text, f"{self.folder / 'config.json'}: text_config is {text!r}")

    def _form(self) -> Form | None:
        path = self.folder / "config.json"
        quantization = self.config.get("quantization_config") or self._text().get("quantization_config")
        if not quantization and (self.folder / "hf_quant_config.json").exists():
            path = self.folder / "hf_quant_config.json"  # ModelOpt's own
            quantization = read_json(path).get("quantization")
        if not quantization:
            return None
        _object(quantization, f"{path}: quantization_config is {quantization!r}")
        for form in FORMS.values():
            if form.recognise(quantization):
                return form
        said = {key: quantization[key] for key in ("quant_method", "quant_algo", "format") if key in quantization}
        raise CheckpointError(
            f"{path}: quantization_config is {said}; expected one of MXFP8: quant_method 'mxfp8', 'modelopt' with "
            "quant_algo 'MXFP8', 'compressed-tensors' with format 'mxfp8-quantized', or 'quark' with fp8_e4m3 weights "
            "per_group of 32 and scale_format 'e8m0'"
        )

    def open(self, file: str):
        """A safetensors file of the folder, as ``safe_open`` gives it; opened once."""
        if file not in self._open_files:
            try:
                from safetensors import SafetensorError, safe_open
            except ImportError as error:
                raise ImportError("reading checkpoints takes safetensors: pip install safetensors") from error
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; the checkpoint's index names it")
            try:
                self._open_files[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size
                raise CheckpointError(
                    f"{path}, {size} bytes, is truncated or no safetensors file: {error}; expected "
                    f"{_expected_bytes(path)}"
                ) from error
        return self._open_files[file]

    def _files(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            files = read_json(index).get("weight_map")
            files = _object(files, f"{index}: weight_map is {files!r}")
            for name, file in files.items():
                if not isinstance(file, str):
                    raise CheckpointError(f"{index}: weight_map has {file!r} for {name}; expected a file's name")
            return files
        if not (self.folder / "model.safetensors").exists():
            raise CheckpointError(f"{self.folder} has neither model.safetensors nor {INDEX}")
        return dict.fromkeys(self.open("model.safetensors").keys(), "model.safetensors")

    def _layers(self) -> dict[str, int]:
        layers, stacked = {}, set()
        for name in self.files:
            if match := expert_of(name):
                layers[match["layer"]] = max(layers.get(match["layer"], 0), int(match["expert"]) + 1)
            elif match := stacked_of(name):
                stacked.add((match["layer"], name))
        for layer, name in stacked:
            dims = "E, 2I, H" if "gate_up_proj" in name else "E, H, I"
            layers[layer] = self._shape(name, dims)[0]
        return {layer: layers[layer] for layer in sorted(layers, key=_natural)}

    # --- tensors

    def _slice(self, name: str, takes: str = "", beside: str = ""):
        """A tensor that is not read yet."""
        if name not in self.files:
            where = f", beside {beside} in {self.folder / self.files[beside]}" if beside in self.files else ""
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; expected {takes or 'it'}{where}")
        file = self.open(self.files[name])
        try:
            return file.get_slice(name)
        except Exception as error:
            path = self.folder / self.files[name]
            raise CheckpointError(
                f"{path}: tensor {name} is missing; expected {takes or 'it'}: the index names this file for it"
            ) from error

    def _shape(self, name: str, dims: str) -> list[int]:
        """Of a tensor that is to have these dimensions."""
        tensor, rank = self._slice(name, f"[{dims}]"), len(dims.split(","))
        shape = tensor.get_shape()
        if len(shape) != rank:
            raise CheckpointError(
                f"{self.folder / self.files[name]}: tensor {name} is {tensor.get_dtype()} {list(shape)}; expected "
                f"{rank} dimensions, [{dims}]"
            )
        return shape

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], beside: str = ""):
        takes = f"{' or '.join(dtypes)} {list(shape)}"
        tensor = self._slice(name, takes, beside)
        got = tensor.get_dtype(), tuple(tensor.get_shape())
        if got[0] not in dtypes or got[1] != shape:
            raise CheckpointError(
                f"{self.folder / self.files[name]}: tensor {name} is {got[0]} {list(got[1])}; expected {takes}"
            )
        return tensor

    def _kinds(self, weight: str) -> dict[str, tuple[str, tuple[str, ...], int]]:
        """The tensors of one weight: kind -> (name, dtypes, values per element)."""
        if self.form is None:
            return {"": (weight, tuple(_HIGH_PRECISION), 1)}
        if weight.endswith(".weight"):
            scale = weight.removesuffix("weight") + self.form.scale
        else:
            scale = f"{weight}_{self.form.scale.removeprefix('weight_')}"
        return {"": (weight, ("F8_E4M3",), 1), "_scale": (scale, _SCALES, BLOCK)}

    def _expert_name(self, layer: str, expert: int, matrix: str) -> str:
        for name, of in MATRICES.items():
            if of == matrix and f"{layer}.experts.{expert}.{name}.weight" in self.files:
                return f"{layer}.experts.{expert}.{name}.weight"
        style = ("w1", "w3", "w2") if f"{layer}.experts.0.w1.weight" in self.files else tuple(MATRICES)[:3]
        return f"{layer}.experts.{expert}.{style[('gate', 'up', 'down').index(matrix)]}.weight"

    def _stacked_name(self, layer: str, matrix: str) -> str | None:
        for name in (f"{layer}.experts.{matrix}", f"{layer}.experts.{matrix}.weight"):
            if name in self.files:
                return name
        return None

    def _first(self, layer: str) -> str:
        """The name of a down projection of a layer."""
        return self._stacked_name(layer, "down_proj") or self._expert_name(layer, 0, "down")

    def sizes(self, layer: str) -> tuple[int, int, int]:
        """G, H and the whole I of a layer, as its tensors have them."""
        if layer not in self.layers:
            takes = f"one of {', '.join(self.layers)}" if self.layers else "a checkpoint that has some"
            raise CheckpointError(f"{self.folder}: {layer} has no experts; expected {takes}")
        name, count = self._first(layer), self.layers[layer]
        shape = self._shape(name, "E, H, I" if stacked_of(name) else "H, I")
        hidden, intermediate = shape[-2:]
        if hidden % BLOCK or intermediate % BLOCK:
            raise CheckpointError(
                f"{self.folder / self.files[name]}: tensor {name} is {self._slice(name).get_dtype()} {shape}; expected "
                f"whole blocks of {BLOCK}"
            )
        config = self.config | self._text()
        for key in _EXPERT_COUNTS:
            if isinstance(config.get(key), int) and config[key] > count:
                absent = f"{self._expert_name(layer, count, 'down')} is missing"
                wrong = f"{name} is of {count} experts" if stacked_of(name) else absent
                raise CheckpointError(
                    f"{self.folder}: tensor {wrong}; expected {config[key]} experts, config.json's {key}"
                )
        return count, hidden, intermediate

    @property
    def gate_up_order(self) -> str:
        """Of stacked weights and biases, as the model's family has them."""
        return "interleaved" if self.config.get("model_type") == "gpt_oss" else "concatenated"

    def check_layer(self, layer: str) -> None:
        """Raises CheckpointError unless the weights of a layer's routed experts are all there, of fitting dtypes and
        shapes. Reads headers alone."""
        count, hidden, intermediate = self.sizes(layer)
        gate_up, down = self._stacked_name(layer, "gate_up_proj"), self._stacked_name(layer, "down_proj")
        if gate_up and down:
            shapes = {gate_up: (count, 2 * intermediate, hidden), down: (count, hidden, intermediate)}
        else:
            of = dict(gate=(intermediate, hidden), up=(intermediate, hidden), down=(hidden, intermediate))
            shapes = {self._expert_name(layer, expert, name): of[name] for expert in range(count) for name in of}
        for weight, shape in shapes.items():
            for name, dtypes, block in self._kinds(weight).values():
                self._expect(name, (*shape[:-1], shape[-1] // block), dtypes, beside=weight)

    # --- modules

    def experts(
        self, layers: Iterable[str] | None = None, *, progress: Callable[[int, int, str], None] | None = show_progress,
        **options,
    ) -> Iterator[tuple[str, Mxfp8Experts]]:  # fmt: skip
        """(name, module) of every layer with experts, one after the other; each is read when it is asked for.

        Args:
            layers: of ``self.layers``; all by default.
            progress: called with (done, total, name) after each layer.
            **options: of :meth:`load`.
        """
        layers = list(self.layers if layers is None else layers)
        for done, layer in enumerate(layers, 1):
            yield layer, self.load(layer, **options)
            if progress:
                progress(done, len(layers), layer)

    def load(
        self,
        layer: str,
        *,
        gate_up_order: str | None = None,
        scale_rounding: str = "rceil",
        shared: SharedExpert | None = None,
        device: torch.device | str | None = None,
        **options,
    ) -> Mxfp8Experts:
        """The experts of one layer as a module. Reads what this rank holds and no more.

        On the CPU with layout row_major, bytes go from the file's memory map to the module's buffers; else one layer is
        in memory twice, never the model. A checkpoint that is not quantised is quantised.

        Args:
            layer: one of ``self.layers``.
            gate_up_order: of stacked weights; that of the model's family by default, ``"interleaved"`` for gpt-oss.
            shared: fuse the layer's ``shared_experts``; ``count`` has to fit their size. Those that a checkpoint has in
                high precision, beside quantised routed ones, are quantised.
            device, scale_rounding, **options: of :class:`.Mxfp8Experts`, such as ``layout``, ``tp_rank``, ``ep_rank``
                and the activation, which has to be given where config.json speaks of another than plain SwiGLU.

        Raises:
            CheckpointError: a tensor is missing, or not of the dtype and shape that is expected, or a bias is not read.
            ValueError, TypeError: an option is not as above.
        """
        self._check_activation(options)
        count, hidden, intermediate = self.sizes(layer)
        order = gate_up_order or self.gate_up_order
        check_source(order, scale_rounding)
        biases = self._biases(layer, count, hidden, intermediate)
        module = Mxfp8Experts(
            count, hidden, intermediate, shared=shared, device="meta", bias=bool(biases), **options
        )
        module._to_empty(torch.device(device) if device is not None else torch.get_default_device())
        direct = module.layout == "row_major" and module.w1.device.type == "cpu" and self.form is not None
        target = {name: getattr(module, name) for name in ("w1", "w1_scale", "w2", "w2_scale")}
        if not direct:
            given = self._slice(self._first(layer)).get_dtype()
            dtype = torch.float8_e4m3fn if self.form else _HIGH_PRECISION.get(given)
            inner, slots = module.local_intermediate_size, module.num_local_experts + module.num_shared
            shapes = dict(w1=(slots, 2 * inner, hidden), w2=(slots, hidden, inner))
            target = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, shape in shapes.items()}
            if self.form:
                target |= {
                    f"{name}_scale": torch.empty((*shape[:-1], shape[-1] // BLOCK), dtype=torch.uint8, device="cpu")
                    for name, shape in shapes.items()
                }
        ids = module.expert_ids
        with torch.inference_mode():
            self._read(layer, module, target, ids, order, scale_rounding)
        if not direct:
            made: dict[str, Any] = dict(target, experts=ids, scale_rounding=scale_rounding)
            module.update_weights(**made)
        if biases:
            module.update_weights(
                w1_bias=biases.get("w1_bias"), w2_bias=biases.get("w2_bias"), gate_up_order=order
            )
        return module

    def _read(
        self, layer: str, module: Mxfp8Experts, target: dict[str, Tensor], ids: list[int], order: str,
        scale_rounding: str,
    ) -> None:  # fmt: skip
        """This rank's part of a layer into row-major tensors."""
        count, hidden, intermediate = self.sizes(layer)
        first, last = module.tp_range
        gate_up, down = self._stacked_name(layer, "gate_up_proj"), self._stacked_name(layer, "down_proj")
        halves = {name: x.unflatten(1, (2, -1)) for name, x in target.items() if name.startswith("w1")}

        def put(out: Tensor, values: Tensor) -> None:
            byte = out.itemsize == 1
            out.view(torch.uint8).copy_(values.view(torch.uint8)) if byte else out.copy_(values)

        def refuse_bias(weight: str) -> None:
            bias = f"{weight.removesuffix('.weight')}.bias"
            if bias in self.files:
                raise CheckpointError(
                    f"{self.folder / self.files[bias]}: tensor {bias} would be left out; expected no biases but "
                    "stacked ones, experts.gate_up_proj_bias and experts.down_proj_bias"
                )

        def place(kind: str, slot: int, matrix: str) -> Tensor:
            """Where one matrix of an expert goes."""
            return target[f"w2{kind}"][slot] if matrix == "down" else halves[f"w1{kind}"][slot, int(matrix == "up")]

        def read(weight: str, expert_slots: list[tuple[int, int, int]], matrix: str, shape: tuple[int, int]) -> None:
            """(expert's first row or column, slot, index in a stack or -1) of the tensors of one matrix."""
            refuse_bias(weight)
            for kind, (name, dtypes, block) in self._kinds(weight).items():
                whole = shape[0], shape[1] // block
                lead = () if expert_slots[0][2] < 0 else (count,)
                tensor = self._expect(name, (*lead, *whole), dtypes, beside=weight)
                for offset, slot, index in expert_slots:
                    a, b = first + offset, last + offset
                    if matrix == "down":
                        a, b = a // block, b // block
                        part = tensor[:, a:b] if index < 0 else tensor[index : index + 1, :, a:b][0]
                        put(place(kind, slot, matrix), part)
                    elif matrix == "gate_up":
                        pair = halves[f"w1{kind}"][slot]
                        if order == "interleaved":
                            part = tensor[index : index + 1, 2 * a : 2 * b][0]
                            put(pair, part.unflatten(0, (-1, 2)).transpose(0, 1))
                        else:
                            for half in (0, 1):
                                start = half * intermediate
                                put(pair[half], tensor[index : index + 1, start + a : start + b][0])
                    else:
                        put(place(kind, slot, matrix), tensor[a:b])

        def quantise(name: str, expert_slots: list[tuple[int, int, int]], matrix: str, shape: tuple[int, int]) -> None:
            """The same of one that the checkpoint does not have quantised."""
            refuse_bias(name)
            tensor = self._expect(name, shape, tuple(_HIGH_PRECISION))
            for offset, slot, _ in expert_slots:
                a, b = first + offset, last + offset
                part = tensor[:, a:b] if matrix == "down" else tensor[a:b]
                for kind, values in zip(("", "_scale"), quantize_1x32(part, scale_rounding)):
                    put(place(kind, slot, matrix), values)

        routed = [(slot, expert) for slot, expert in enumerate(ids) if expert < count]
        if gate_up and down:
            read(gate_up, [(0, *pair) for pair in routed], "gate_up", (2 * intermediate, hidden))
            read(down, [(0, *pair) for pair in routed], "down", (hidden, intermediate))
        else:
            for slot, expert in routed:
                for matrix in ("gate", "up", "down"):
                    shape = (hidden, intermediate) if matrix == "down" else (intermediate, hidden)
                    read(self._expert_name(layer, expert, matrix), [(0, slot, -1)], matrix, shape)
        shared = [(slot, expert - count) for slot, expert in enumerate(ids) if expert >= count]
        if shared:
            size = module.num_shared * intermediate
            for matrix in ("gate", "up", "down"):
                shape = (hidden, size) if matrix == "down" else (size, hidden)
                slots = [(index * intermediate, slot, -1) for slot, index in shared]
                name = self._shared_name(layer, matrix)
                high = name in self.files and self._slice(name).get_dtype() in _HIGH_PRECISION
                (quantise if self.form and high else read)(name, slots, matrix, shape)

    def _shared_name(self, layer: str, matrix: str) -> str:
        names = [f"{layer}.shared_experts.{name}.weight" for name, of in MATRICES.items() if of == matrix]
        return next((name for name in names if name in self.files), names[0])

    def _biases(self, layer: str, count: int, hidden: int, intermediate: int) -> dict[str, Tensor]:
        """Stacked biases, as gpt-oss names them; small, so whole."""
        biases = {}
        for name, matrix, size in (("w1_bias", "gate_up_proj", 2 * intermediate), ("w2_bias", "down_proj", hidden)):
            key = f"{layer}.experts.{matrix}_bias"
            if key in self.files:
                biases[name] = self._expect(key, (count, size), tuple(_HIGH_PRECISION))[:]
        return biases

    def _check_activation(self, options: dict) -> None:
        """Refuses to guess what config.json says of the activation in words of its own."""
        config = self.config | self._text()
        if any(name.startswith("swiglu_") for name in options):
            return
        special = {name: config[name] for name in config if "swiglu" in name and config[name] not in (None, False)}
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            special["hidden_act"] = config["hidden_act"]
        if special:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: the activation is {special}, not plain SwiGLU; expected swiglu_alpha, "
                "swiglu_beta and swiglu_limit to be given"
            )


def _expected_bytes(path: Path) -> str:
    """What a safetensors file's header says of its size."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(file.read(length)) if len(start) == 8 and length < 1 << 30 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        return "8 bytes that give the length of a header of JSON, and that header"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return f"{8 + length + max(ends, default=0)} bytes, as its header says"


def load_experts(folder: str | Path, **options) -> dict[str, Mxfp8Experts]:
    """Every layer's experts of a checkpoint folder, by the name of the module that holds them.

    Args:
        folder: with config.json and safetensors files.
        **options: of :meth:`Checkpoint.experts`: ``progress``, ``device``, ``layout``, ``tp_rank``, ...

    Raises:
        CheckpointError: names the file, the tensor and what was expected.
    """
    with Checkpoint(folder) as checkpoint:
        return dict(checkpoint.experts(**options))
