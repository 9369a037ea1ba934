"""SAM 2.1 and MedSAM2 as a segmenter, through transformers' `Sam2Model`, and their memory, through `Sam2VideoModel`.

Weights come from a hub id, a folder of the transformers kind, or an original checkpoint: a `.pt` file as
facebookresearch/sam2 and bowang-lab/MedSAM2 publish it, whose state dict is renamed here.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Image, Masks, Prompt
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.files import one_line
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.cache import EmbeddingCache
from ibisagent.segmenters.postprocess import split_prompts
from ibisagent.segmenters.runtime import choose_device

if TYPE_CHECKING:
    import torch
    from transformers import Sam2Config, Sam2Model, Sam2Processor, Sam2VideoConfig, Sam2VideoProcessor

MAX_LOGIT = 32.0  # as SAM 2 clamps the mask that it is given back
SEEN_BY_PEOPLE = 4  # images whose masks were given and that are kept in mind: the latest
_CHECKPOINT = re.compile(r"(?P<file>.+\.pth?)(@(?P<side>\d+))?")

# (channels, blocks) of the image encoder -> its shape, from the YAML files of facebookresearch/sam2
_ENCODERS: Mapping[tuple[int, int], dict[str, Any]] = {
    (96, 12): {"stages": [1, 2, 7, 2], "whole": [5, 7, 9], "heads": 1, "windows": [8, 4, 14, 7]},
    (96, 16): {"stages": [1, 2, 11, 2], "whole": [7, 10, 13], "heads": 1, "windows": [8, 4, 14, 7]},
    (112, 24): {"stages": [2, 3, 16, 3], "whole": [12, 16, 20], "heads": 2, "windows": [8, 4, 14, 7]},
    (144, 48): {"stages": [2, 6, 36, 4], "whole": [23, 33, 43], "heads": 2, "windows": [8, 4, 16, 8]},
}

# original name -> transformers' name, applied in this order
_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
        (r"^obj_ptr_proj\.layers\.0\.", "object_pointer_proj.proj_in."),
        (r"^obj_ptr_proj\.layers\.1\.", "object_pointer_proj.layers.0."),
        (r"^obj_ptr_proj\.layers\.2\.", "object_pointer_proj.proj_out."),
        (r"^memory_attention\.norm\.", "memory_attention.layer_norm."),
        *((rf"\.encoder\.{3 * n}\.", f".layers.{n}.conv.") for n in range(4)),  # of memory_encoder.mask_downsampler
        *((rf"\.encoder\.{3 * n + 1}\.", f".layers.{n}.layer_norm.") for n in range(4)),
        (r"\.encoder\.12\.", ".final_conv."),
        (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
        (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
        (r"^memory_encoder\.fuser\.layers\.(\d+)\.gamma$", r"memory_encoder.memory_fuser.layers.\1.scale"),
        (r"^memory_encoder\.fuser\.layers\.(\d+)\.norm\.", r"memory_encoder.memory_fuser.layers.\1.layer_norm."),
        (r"^memory_encoder\.fuser\.layers\.(\d+)\.dw", r"memory_encoder.memory_fuser.layers.\1.depthwise_"),
        (r"^memory_encoder\.fuser\.layers\.(\d+)\.pw", r"memory_encoder.memory_fuser.layers.\1.pointwise_"),
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
        (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),  # two layers here,
        (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
        (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),  # three there
        (r"(_mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(_mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
    )
)
_MEMORY = re.compile(  # transformers' names of what only the memory needs
    r"^(memory_|no_memory_positional|no_object_pointer|occlusion_|temporal_positional|object_pointer_|mask_downsample)"
)
_REMEDY = "give a checkpoint as facebookresearch/sam2 or bowang-lab/MedSAM2 publish it"
_PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")  # of a config, but for the memory
_POINT_EMBEDDING = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d+)\.weight$")


class Sam2:
    """The segmenter. Opening an image embeds it.

    source: a hub id ("facebook/sam2.1-hiera-tiny"), a folder, or a checkpoint: "path/to/file.pt", or
    "owner/repository/file.pt" to fetch it from the hub. A checkpoint does not say its image size: it is 512 where
    the file's name has "medsam2" in it, else 1024, unless the source says so ("file.pt@512"). A checkpoint of no
    published shape needs its `Sam2Config` as JSON beside it ("file.json").
    """

    def __init__(
        self, source: str, *, device: str = "auto", runtime: str = "auto", cache: EmbeddingCache | None = None
    ) -> None:
        if runtime not in ("auto", "torch"):
            raise ConfigError(f"sam2 runs with torch only, not with '{runtime}': give runtime torch or auto")
        import torch

        self.name = f"sam2:{source}"
        self._multimask = False
        self.cache = cache if cache is not None else EmbeddingCache()
        checkpoint = _CHECKPOINT.fullmatch(source)
        self._side = int(checkpoint["side"]) if checkpoint and checkpoint["side"] else None
        if checkpoint:
            self._file = _find_checkpoint(checkpoint["file"])
            model: Any
            model, self._processor = _from_original(self._file, self._side)
        else:
            model, self._processor, self._file = _from_transformers(source)
        self._device = choose_device(device)
        try:
            self._model = model.eval().requires_grad_(False).to(torch.device(self._device))
        except (RuntimeError, AssertionError) as error:
            raise SegmenterError(
                f"device '{device}' cannot be used: {one_line(error, 300)}; give device cpu"
            ) from error

    def open(self, image: Image) -> Sam2Session:
        """A session on `image`; its embedding comes from the cache where it is there, and stays on the device."""

        def embed() -> tuple[torch.Tensor, ...]:
            try:
                inputs = self._processor(images=image.pixels, return_tensors="pt").to(self._device)
                return tuple(self._model.get_image_embeddings(inputs["pixel_values"]))
            except RuntimeError as error:
                raise SegmenterError(
                    f"{self.name}: embedding failed on {self._device}: {one_line(error, 300)}"
                ) from error

        features = self.cache.fetch(f"{self.name} {self._device}", image.sha256, embed)
        return Sam2Session(image.size, features, self._model, self._processor, self._multimask)

    def with_multimask(self) -> Sam2:
        """See `segmenters.Multimask`."""
        twin = copy(self)
        twin._multimask = True
        return twin

    def memory(self) -> Sam2Memory | None:
        """An empty memory; None where the weights are of a model for single images. Loaded when first needed."""
        if self._video is None:
            return None
        return Sam2Memory(*self._video, self._device)

    @cached_property
    def _video(self) -> tuple[Any, Sam2VideoProcessor] | None:
        """The model with its memory, which shares the image encoder, and its processor."""
        import torch
        from transformers import Sam2VideoProcessor, Sam2VideoVideoProcessor

        if _CHECKPOINT.fullmatch(self._file.name):
            model = _video_from_original(self._file, self._side)
        else:
            model = _video_from_transformers(self._file.parent)
        if model is None:
            return None
        model.vision_encoder = self._model.vision_encoder
        side = self._processor.target_size
        videos: Any = Sam2VideoVideoProcessor
        processor = Sam2VideoProcessor(self._processor.image_processor, videos(size={"height": side, "width": side}))
        return model.eval().requires_grad_(False).to(torch.device(self._device)), processor

    @cached_property
    def _weights_sha256(self) -> str:
        with self._file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def describe(self) -> dict[str, str]:
        """Facts for records."""
        import torch
        import transformers

        return {
            "segmenter": self.name,
            "runtime": f"torch {torch.__version__} {self._device}, transformers {transformers.__version__}",
            "weights_sha256": self._weights_sha256,
            "licence": "as its source states",
        }


class Sam2Session:
    """One embedded image. Its logits are (h, w) float32, on the decoder's own square grid."""

    def __init__(
        self,
        size: tuple[int, int],
        features: Sequence[torch.Tensor],
        model: Any,
        processor: Sam2Processor,
        multimask: bool = False,
    ) -> None:
        self._size = size
        self._features = features
        self._model = model
        self._processor = processor
        self._multimask = multimask
        rows, columns = model.prompt_encoder.mask_input_size
        self._grid = (int(rows), int(columns))

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`. Three masks are asked for, and the one of the best score kept, only for a single
        click with nothing else: that is when SAM 2 may still mean a part or the whole. With multimask at every step."""
        import torch

        check_prompts(prompts, self._size)
        check_prior(prior, self._size, self._grid)
        _, _, box = split_prompts(prompts)
        clicks = [prompt for prompt in prompts if isinstance(prompt, Click)]
        asked: dict[str, Any] = {}
        if clicks:
            asked["input_points"] = [[[self._centre(click.x, click.y) for click in clicks]]]
            asked["input_labels"] = [[[int(click.positive) for click in clicks]]]
        if box is not None:
            asked["input_boxes"] = [[self._corners(box)]]
        try:
            device = self._features[-1].device
            inputs = dict(self._processor(original_sizes=[list(self._size)], return_tensors="pt", **asked).to(device))
            inputs.pop("original_sizes")
            if prior is not None:
                inputs["input_masks"] = torch.from_numpy(self._as_logits(prior)[None, None]).to(device)
            multimask = self._multimask or (len(clicks) == 1 and box is None and prior is None)
            with torch.inference_mode():
                output = self._model(image_embeddings=list(self._features), multimask_output=multimask, **inputs)
            scores = output.iou_scores[0, 0].float().cpu().numpy()
            masks = output.pred_masks[0, 0].float().cpu().numpy()
        except RuntimeError as error:
            raise SegmenterError(f"sam2 failed: {one_line(error, 300)}") from error
        best = int(scores.argmax())
        mask = cv2.resize(masks[best], self._size[::-1], interpolation=cv2.INTER_LINEAR) > 0
        logits = np.clip(masks[best], -MAX_LOGIT, MAX_LOGIT)
        return Prediction(mask, float(np.clip(scores[best], 0, 1)), logits)

    def _centre(self, x: float, y: float) -> list[float]:
        """Where the processor wants a pixel's centre: it scales to the network, which then adds half a pixel."""
        height, width = self._size
        side = self._processor.target_size
        return [x + 0.5 - 0.5 * width / side, y + 0.5 - 0.5 * height / side]

    def _corners(self, box: Box) -> list[float]:
        return [*self._centre(box.x0, box.y0), *self._centre(box.x1 - 1, box.y1 - 1)]

    def _as_logits(self, prior: np.ndarray) -> np.ndarray:
        """The prior as mask logits on the decoder's grid; a bool mask becomes -10 to 10."""
        if prior.dtype != np.bool_:
            return prior.astype(np.float32)
        resized = cv2.resize(prior.astype(np.float32), self._grid[::-1], interpolation=cv2.INTER_AREA)
        return 20 * (resized - 0.5)


class Sam2Memory:
    """See `segmenters.Memory`. Costs an embedding an image, and holds as many images as the model can attend to."""

    def __init__(self, model: Any, processor: Sam2VideoProcessor, device: str) -> None:
        self._model, self._processor, self._device = model, processor, device
        self._session: Any = processor.init_video_session(inference_device=device)
        self._targets: list[str] = []
        self._next = 0

    def remember(self, image: Image, masks: Masks) -> None:
        """See `segmenters.Memory`."""
        if not masks or not all(mask.any() for mask in masks.values()):
            raise SegmenterError("sam2: nothing to remember: a mask is empty")
        self._targets += [target for target in masks if target not in self._targets]
        self._session.video_height, self._session.video_width = image.size
        self._processor.add_inputs_to_inference_session(
            self._session,
            self._next,
            [self._targets.index(target) for target in masks],
            input_masks=[mask.astype(np.float32) for mask in masks.values()],
        )
        self._see(image)

    def predict(self, image: Image) -> dict[str, Prediction]:
        """See `segmenters.Memory`."""
        logits, there = self._see(image)
        found = {}
        for target, plane, sure in zip(self._targets, logits, there, strict=True):
            mask = cv2.resize(plane, image.size[::-1], interpolation=cv2.INTER_LINEAR) > 0
            found[target] = Prediction(mask, float(sure), plane)
        return found

    def _see(self, image: Image) -> tuple[np.ndarray, np.ndarray]:
        """Mask logits (N, h, w) and chances (N,) of the targets on the next image."""
        import torch

        if not self._targets:
            raise SegmenterError("sam2: there is nothing in mind to follow: remember a mask first")
        try:
            pixels = self._processor(images=image.pixels, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                output = self._model(self._session, frame_idx=self._next, frame=pixels.to(self._device))
        except RuntimeError as error:
            raise SegmenterError(f"sam2: its memory failed: {one_line(error, 300)}") from error
        self._next += 1
        self._forget()
        there = output.object_score_logits.float().sigmoid().flatten()
        return output.pred_masks[:, 0].float().clamp(-MAX_LOGIT, MAX_LOGIT).cpu().numpy(), there.cpu().numpy()

    def _forget(self) -> None:
        """Drop what is never attended to again, or else memory would grow with the number of images."""
        session, config = self._session, self._model.config
        reach = self._next - max(config.num_maskmem, config.max_object_pointers_in_encoder)
        session.processed_frames = {}
        for number, outputs in session.output_dict_per_obj.items():
            given, own = outputs["cond_frame_outputs"], outputs["non_cond_frame_outputs"]
            stale = [given, sorted(given)[:-SEEN_BY_PEOPLE]], [own, [frame for frame in own if frame < reach]]
            for kept, frames in stale:
                for frame in frames:
                    del kept[frame]
            session.mask_inputs_per_obj[number].clear()
            tracked = session.frames_tracked_per_obj[number]
            session.frames_tracked_per_obj[number] = {f: how for f, how in tracked.items() if f >= reach}


def rename_original(state: Mapping[str, torch.Tensor], *, memory: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of an original SAM 2 or MedSAM2 checkpoint under the names of transformers' `Sam2Model`.

    memory: with what `Sam2VideoModel` has beside that (memory, object pointers).
    """
    import torch

    renamed: dict[str, torch.Tensor] = {}
    points: dict[int, torch.Tensor] = {}
    for original, tensor in state.items():
        if point := _POINT_EMBEDDING.match(original):
            points[int(point[1])] = tensor
            continue
        name = original
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        if memory or not _MEMORY.match(name):
            renamed[name] = tensor
    if points:
        renamed["prompt_encoder.point_embed.weight"] = torch.cat([points[index] for index in sorted(points)])
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    if shared in renamed:
        renamed["shared_image_embedding.positional_embedding"] = renamed[shared]
    return renamed


def _find_checkpoint(file: str) -> Path:
    """The checkpoint on this machine; fetched from the hub where `file` is owner/repository/name and not a path."""
    path = Path(file).expanduser()
    if path.is_file():
        return path
    owner, _, rest = file.partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository and name) or "/" in name or owner in (".", "..", "~"):
        raise ConfigError(f"{path}: there is no such file: give the path of a SAM 2 or MedSAM2 checkpoint")
    found = _fetch(f"{owner}/{repository}", [name]) / name
    if not found.is_file():
        raise ConfigError(f"{file}: the hub's {owner}/{repository} has no {name}: check the name")
    return found


def _fetch(repository: str, patterns: list[str]) -> Path:
    """The folder of a hub repository's files, downloaded unless they are in the Hugging Face cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        remedy = f"run `hf download {repository} --local-dir weights` on a machine with internet, and give its path"
        reason = one_line(error)
        raise ConfigError(f"sam2: {repository} is not here and cannot be downloaded ({reason}): {remedy}") from error


def _from_transformers(source: str) -> tuple[Sam2Model, Sam2Processor, Path]:
    """Model, processor and weights file of a folder or hub id."""
    from transformers import Sam2Config, Sam2Model, Sam2Processor

    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
            raise ConfigError(f"sam2: there is no {source}: give a hub id, a folder or a .pt file of SAM 2 or MedSAM2")
        folder = _fetch(source, ["*.json", "model.safetensors"])
    report: dict[str, Any]
    model: Any
    loader: Any = Sam2Model
    try:
        processor = Sam2Processor.from_pretrained(folder, local_files_only=True)
        said = json.loads((folder / "config.json").read_text())
        parts = {part: said[part] for part in _PARTS if part in said}  # published ones are of type sam2_video
        model, report = loader.from_pretrained(
            folder,
            config=Sam2Config.from_dict(parts),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        remedy = "give a hub id, a folder or a .pt file of SAM 2 or MedSAM2"
        raise ConfigError(f"sam2: {source} cannot be loaded ({one_line(error, 300)}): {remedy}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise SegmenterError(f"sam2: {source} lacks {len(missing)} weights, such as {missing[0]}: give a SAM 2 model")
    return model, processor, folder / "model.safetensors"


def _read_original(path: Path) -> Mapping[str, torch.Tensor]:
    """The state dict of an original checkpoint."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SegmenterError(f"{path}: damaged, or holds more than tensors: {_REMEDY}") from error
    except (OSError, EOFError, RuntimeError) as error:
        raise SegmenterError(f"{path}: cannot be read ({one_line(error, 300)}): {_REMEDY}") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
    if "image_encoder.trunk.patch_embed.proj.weight" not in state:
        raise SegmenterError(f"{path}: not a SAM 2 checkpoint, it has no image_encoder.trunk: {_REMEDY}")
    return cast("Mapping[str, torch.Tensor]", state)


def _load(model: Any, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put renamed weights into a model of transformers."""
    if not any(".o_proj." in name for name in model.state_dict()):  # as earlier transformers 5 call it
        state = {name.replace(".o_proj.", ".out_proj."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SegmenterError(f"{path}: its weights do not fit SAM 2 ({one_line(error, 300)}): {_REMEDY}") from error


def _from_original(path: Path, side: int | None) -> tuple[Sam2Model, Sam2Processor]:
    """Model and processor of an original checkpoint."""
    from transformers import Sam2ImageProcessor, Sam2Model, Sam2Processor

    state = rename_original(_read_original(path))
    model = Sam2Model(_config(path, state, side))
    _load(model, state, path)
    network_side: Any = model.prompt_encoder.input_image_size
    return model, Sam2Processor(Sam2ImageProcessor(size={"height": network_side, "width": network_side}))


def _video_from_original(path: Path, side: int | None) -> Any:
    """The model with its memory; None where the checkpoint has none."""
    from transformers import Sam2VideoModel

    state = rename_original(_read_original(path), memory=True)
    if not any(_MEMORY.match(name) for name in state):
        return None
    model = Sam2VideoModel(_video_config(path, state, side))
    _load(model, state, path)
    return model


def _video_config(path: Path, state: Mapping[str, torch.Tensor], side: int | None) -> Sam2VideoConfig:
    """The shape of a checkpoint with its memory: from the JSON beside it, else the published one."""
    from transformers import Sam2VideoConfig

    beside = path.with_suffix(".json")
    if beside.is_file() and json.loads(beside.read_text()).get("model_type") == "sam2_video":
        return Sam2VideoConfig.from_dict(json.loads(beside.read_text()))
    plain = _config(path, state, side)
    prompts: Any = plain.prompt_encoder_config
    network_side = prompts.image_size
    is_new = "occlusion_spatial_embedding_parameter" in state  # SAM 2.1, not 2.0
    return Sam2VideoConfig(
        vision_config=plain.vision_config,
        prompt_encoder_config=plain.prompt_encoder_config,
        mask_decoder_config=plain.mask_decoder_config,
        image_size=network_side,
        memory_attention_rope_feat_sizes=[network_side // 16] * 2,
        enable_occlusion_spatial_embedding=is_new,
        enable_temporal_pos_encoding_for_object_pointers=is_new,
    )


def _video_from_transformers(folder: Path) -> Any:
    """The model with its memory from a folder; None where its weights have none."""
    from transformers import Sam2VideoModel

    try:
        if json.loads((folder / "config.json").read_text()).get("model_type") != "sam2_video":
            return None
        loader: Any = Sam2VideoModel
        model, report = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"sam2: {folder} cannot be loaded with its memory ({one_line(error, 300)})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise SegmenterError(f"sam2: {folder} lacks {len(missing)} weights of the memory, such as {missing[0]}")
    return model


def _config(path: Path, state: Mapping[str, torch.Tensor], side: int | None) -> Sam2Config:
    """The shape of a checkpoint: from the JSON beside it, else from its tensors."""
    from transformers import Sam2Config

    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            return Sam2Config.from_dict(json.loads(beside.read_text()))
        except (OSError, ValueError) as error:
            raise SegmenterError(
                f"{beside}: not a Sam2Config ({one_line(error, 300)}): correct or remove it"
            ) from error
    channels = int(state["vision_encoder.backbone.patch_embed.projection.weight"].shape[0])
    blocks = {name.split(".")[3] for name in state if name.startswith("vision_encoder.backbone.blocks.")}
    encoder = _ENCODERS.get((channels, len(blocks)))
    if encoder is None:
        raise SegmenterError(
            f"{path}: an image encoder of {channels} channels and {len(blocks)} blocks is none of the published ones: "
            f"put its Sam2Config as {beside.name} beside it"
        )
    side = side or (512 if "medsam2" in path.name.lower() else 1024)
    background = list(state["vision_encoder.backbone.pos_embed"].shape[2:])
    widths = [channels * 2**stage for stage in range(4)]
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": channels,
                "num_attention_heads": encoder["heads"],
                "image_size": [side, side],
                "blocks_per_stage": encoder["stages"],
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [encoder["heads"] * 2**stage for stage in range(4)],
                "window_size_per_stage": encoder["windows"],
                "global_attention_blocks": encoder["whole"],
                "window_positional_embedding_background_size": background,
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[side // stride, side // stride] for stride in (4, 8, 16)],
        },
        prompt_encoder_config={"image_size": side},
    )
