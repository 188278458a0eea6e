"""A family of guided students: one network taught every guidance weight, written at some of them.

    w2/                    a Diffusers folder: the network at w = 2, of the teacher's own form, one evaluation a step
    guidance.safetensors   e(w), what another weight adds to the embedding of the timestep
    guidance.json          the range of weights, and the folder that e(w) is counted from

The folders need no code of ours to run, and each is a teacher of ordinary form: `distill` takes it further to few
steps. `at_weight` makes the network at any other weight of the range, exactly: e(w) is added to one bias.
"""

from pathlib import Path
from typing import Any

from ado_tasks.backend import mlx_utils
from ado_tasks.config import as_plain
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, check_teacher, read_model, write_model
from ado_tasks.models.embeddings import WeightEmbedding
from ado_tasks.models.quantised import check_floating
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.weights import load_weights
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.optimise.guided import GUIDANCE, UNET, Folding, GuidedConfig, with_weight
from ado_tasks.optimise.loop import Curve, Loop
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.pictures import save_curves
from ado_tasks.report import Reporter
from ado_tasks.sampling import null_label_of
from ado_tasks.storage import atomic_folder, load_arrays, read_json, save_arrays, sha256_tree, write_json

LAYER, RANGE = "guidance.safetensors", "guidance.json"


def fold(
    config: GuidedConfig, *, teacher: Path, dataset: Path, out: Path, scratch: Path, seed: int, report: Reporter
) -> Curve:
    """Fold a teacher's guidance into one network (Meng et al. 2023, stage one); write one folder for each weight.

    Args:
        config: see GuidedConfig.
        teacher: a Diffusers folder whose training dropped labels (`train.label_dropout`).
        dataset: folder made by `prepare`: the train part is learned from.
        out: folder of the family; it appears whole or not at all.
        scratch: checkpoints.
        seed: of the order of images, times, noises and weights.
        report: where progress and losses go.

    Raises:
        ConfigError: the teacher predicts ε, knows no null class or is a student of few steps, or the dataset has other
            sizes or more classes.
        ArtifactError: the teacher or the dataset is damaged.
        DivergenceError: a loss is not finite.
    """
    stored, data = read_model(teacher), open_dataset(dataset)
    check_floating(stored.unet, str(teacher))
    check_teacher(stored, str(teacher))
    kind = str(stored.scheduler_config.get("prediction_type", "epsilon"))
    if kind == "epsilon":
        raise ConfigError(f"{teacher}: predicts epsilon, whose x̂ has no bound as α → 0; allowed: v_prediction, sample")
    stored.unet.config.check_data(data.shape, data.num_classes, f"{teacher}/unet/config.json")
    folding = Folding(config, schedule_from_diffusers(stored.scheduler_config), kind, null_label_of(stored), seed)
    part, embedding = data.split("train"), folding.embedding(stored.unet.config)
    frozen = UNet2D(stored.unet.config)
    frozen.update(stored.unet.parameters())
    targets = folding.targets(frozen)
    inputs = {"dataset": data.sha256, "teacher": sha256_tree(teacher)}
    checkpoints = Checkpoints.under(scratch, run_key(__name__, as_plain(config), inputs, seed))
    step = TrainStep(
        folding.loss(stored.unet, embedding),
        {UNET: stored.unet.parameters(), GUIDANCE: embedding.parameters()},
        clip=config.clip, ema_decay=config.ema_decay, shards=config.shards,
    )  # fmt: skip
    loop = Loop(
        name="guided", steps=config.steps, batch_of=lambda index: folding.batch(part, targets, index),
        learning_rate_of=folding.learning_rate_at, checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every, report=report,
    )  # fmt: skip
    curve = loop.run(step)["training"]
    learned = step.averaged_parameters()
    embedding.update(learned[GUIDANCE])
    _write(out, folding, stored, learned[UNET], embedding, curve)
    report.picture("distillation", out / "distillation.png")
    checkpoints.clear()
    return curve


def folder_of(weight: float) -> str:
    """Name of the folder at a weight: w1, w2.5."""
    return f"w{weight:g}"


def at_weight(family: Path, weight: float) -> StoredModel:
    """The network of a family at any weight that it was taught.

    Raises:
        ArtifactError: the family is damaged, or no such family.
        ConfigError: the weight is outside of the range.
    """
    said = read_json(family / RANGE, "lowest_weight", "highest_weight", "base")
    stored = read_model(family / folder_of(said["base"]))
    embedding = WeightEmbedding(
        stored.unet.config.embedding_width, said["lowest_weight"], said["highest_weight"]
    )  # fmt: skip
    load_weights(embedding, load_arrays(family / LAYER), str(family / LAYER))
    stored.unet.update(with_weight(stored.unet.parameters(), embedding, weight, held=said["base"]))
    record = {**stored.record, "guidance": {"weight": weight}}
    return StoredModel(stored.unet, stored.scheduler_config, record)


def _write(
    out: Path, folding: Folding, stored: StoredModel, learned: Any, embedding: WeightEmbedding, curve: Curve
) -> None:
    config = folding.config
    base = config.weights[0]
    at_base = with_weight(learned, embedding, base)
    with atomic_folder(out) as folder:
        for weight in config.weights:
            stored.unet.update(with_weight(at_base, embedding, weight, held=base))
            record = _record(stored, folding, weight)
            write_model(folder / folder_of(weight), stored.unet, stored.scheduler_config, record)
        save_arrays(folder / LAYER, dict(mlx_utils.tree_flatten(embedding.parameters())))
        write_json(
            folder / RANGE,
            {"lowest_weight": config.lowest_weight, "highest_weight": config.highest_weight, "base": base,
             "weights": list(config.weights)},
        )  # fmt: skip
        write_json(folder / "curves.json", {"guided": curve})
        save_curves(folder / "distillation.png", {"guided distillation": curve}, "weighted squared error")


def _record(stored: StoredModel, folding: Folding, weight: float) -> dict[str, Any]:
    done = {
        "task": "distill", "method": "guided", "weight": weight, "config": as_plain(folding.config),
        "seed": folding.seed,
    }  # fmt: skip
    # The teacher's null class is not named: a network at a weight answers for classes only.
    return {"history": [*stored.record.get("history", []), done], "guidance": {"weight": weight}}
