"""The keys of recipes and the numbers of built-in functions, pinned: `python -m tests.golden` writes them anew.

A key that changes makes every stored result of its kind a stranger. Where that is meant, bump a version, run this
and say so in the commit.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.criteria import CRITERIA
from orchestrator.data import DATASETS, Examples, SplitOutputs, Splits
from orchestrator.forget_sets import FORGET_SETS
from orchestrator.localization import STRATEGIES, select
from orchestrator.metrics import COMPARISONS, METRICS
from orchestrator.models import MODELS, Factory, factory, head_names
from orchestrator.proxies import PROXIES, Watcher
from orchestrator.recipes import RECIPES
from orchestrator.registry import Chosen
from orchestrator.seeds import generator, numpy_generator
from orchestrator.specs import key
from orchestrator.stages import PlainStage, performer
from orchestrator.study import Study
from orchestrator.training import Training
from orchestrator.unlearning import METHODS

FILE = Path(__file__).with_name("golden_keys.json")
FINGERPRINT = "0" * 64  # stands in for the data, which is not at hand for every recipe


def keys_of(study: Study) -> dict[str, Any]:
    """The keys of a study by kind; of its runs, which are many, their number and one hash."""
    runs = sorted(key(run) for _, run in study.runs(FINGERPRINT))
    return {
        "campaign": key(study.campaign_spec(FINGERPRINT)),
        "scores": key(study.scores_spec(FINGERPRINT)),
        "originals": [key(original) for original in study.originals(FINGERPRINT)],
        "references": [key(reference) for reference in study.reference_runs(FINGERPRINT)],
        "runs": {"count": len(runs), "sha256": hashlib.sha256("\n".join(runs).encode()).hexdigest()},
    }


def golden() -> dict[str, Any]:
    """What the file should hold."""
    return {name: keys_of(RECIPES[name].function()) for name in RECIPES}


def _summary(values: Tensor) -> list[float]:
    """Three numbers that move when a tensor's do: mean, mean magnitude, and a sum weighted by position."""
    flat = values.detach().double().flatten()
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return [float(flat.mean()), float(flat.abs().mean()), float((flat * weights).mean())]


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _toy() -> tuple[Splits, Factory, nn.Module]:
    stream = generator(0, "golden")
    images = torch.randint(256, (40, 6, 6, 1), generator=stream, dtype=torch.uint8)
    train = Examples(images, torch.randint(3, (40,), generator=stream))
    fresh = factory("small_cnn", {"width": 10}, (1, 6, 6), 3)
    return Splits(train, train.take(torch.arange(12)), train.take(torch.arange(12, 40))), fresh, fresh(stream)


def _outputs(seed: int) -> dict[str, SplitOutputs]:
    rng = numpy_generator(seed, "golden outputs")
    truth = numpy_generator(0, "golden labels")
    made = {}
    for split in ("forget", "retain", "validation", "test"):
        labels, true_labels = truth.integers(0, 3, (2, 30))
        made[split] = SplitOutputs(rng.normal(size=(30, 3)).astype(np.float16), labels, true_labels)
    return made


SMALL = {"width": 4, "dim": 24, "depth": 1, "heads": 2, "dim_head": 8, "mlp": 16, "patch_size": 4}  # of models
REQUIRED = {  # options of forget sets that have no default
    "file": {"path": "mine.txt"},
    "random_of_classes": {"classes": "a,2"},
    "whole_class": {"label": "c"},
}


def numbers() -> dict[str, dict[str, list[float]]]:
    """A few numbers of every built-in function on a toy, by kind and by name with version."""
    splits, fresh, model = _toy()
    base = STRATEGIES["weighted_gradient"]({"model": model, "splits": splits}, {"batch_size": 8})
    mask = select(base, 0.3, "channel", head=head_names(model))
    training = Training(learning_rate=0.05, epochs=2, batch_size=8)
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, method in METHODS.items():
        small = {
            option: value
            for option, value in (("lr", 0.1), ("epochs", 2), ("batch_size", 8))
            if option in method.options
        }
        inputs = {
            "model": model, "mask": mask, "forget": splits.forget, "retain": splits.retain, "validation": splits.retain,
            "fresh": fresh, "generator": generator(1, "golden"), "training": training, "num_classes": 3,
            "report": lambda *_: None, "initial": lambda: fresh(generator(6, "golden")),
            "memorization": numpy_generator(5, "golden").random(len(splits.forget)),
        }  # fmt: skip
        tuned = PlainStage(Chosen("neg_grad_plus", {"lr": 0.1, "epochs": 1, "batch_size": 4}), None)
        inputs["stages"] = [performer(tuned, place, 8, inputs, splits.train) for place in range(3)]
        found["method"][f"{name} {method.version}"] = _summary(
            _flat(method(inputs, method.resolve(small))) - _flat(model)
        )
    for name, strategy in STRATEGIES.items():
        inputs = {"model": model, "splits": splits, "generator": generator(2, "golden"), "base": base}
        inputs["granularity"] = "channel"
        scores = strategy(inputs, strategy.resolve({}))
        found["strategy"][f"{name} {strategy.version}"] = _summary(
            torch.cat([part.flatten() for part in scores.values()])
        )
    watcher = Watcher(splits.train, with_curvature=True)
    watcher.look(model)
    for name, proxy in PROXIES.items():
        inputs = {"events": watcher.events, "curvature": watcher.curvature, "model": model, "train": splits.train}
        inputs |= {"validation": splits.retain, "generator": generator(7, "golden")}
        small = {option: 2 for option in ("epochs",) if option in proxy.options}
        found["proxy"][f"{name} {proxy.version}"] = _summary(torch.tensor(proxy(inputs, proxy.resolve(small))))
    for name, kind in MODELS.items():
        small = {option: value for option, value in SMALL.items() if option in kind.options}
        made = factory(name, small, (3, 32, 32) if name == "vgg16" else (3, 16, 16), 5)(generator(3, "golden"))
        found["model"][f"{name} {kind.version}"] = _summary(_flat(made))
    inputs = {"outputs": _outputs(1), "reference": _outputs(2), "references": [_outputs(2), _outputs(3)]}
    for side, of in (("metrics", "outputs"), ("reference_metrics", "reference")):
        inputs[side] = {name: metric({"outputs": inputs[of]}, {}) for name, metric in METRICS.items()}
    for name, metric in (*METRICS.items(), *COMPARISONS.items()):
        found["metric"][f"{name} {metric.version}"] = [
            value for _, value in sorted(metric(inputs, metric.resolve({})).items())
        ]
    inputs["original"] = _outputs(2)
    for name, criterion in CRITERIA.items():
        found["criterion"][f"{name} {criterion.version}"] = [criterion(inputs, {})]
    rng = numpy_generator(4, "golden")
    drawn = {"labels": np.arange(200) % 4, "true_labels": np.arange(200) % 4 - (np.arange(200) == 7), "rng": rng}
    drawn |= {"memorization": numpy_generator(5, "golden").random(200), "class_names": tuple("abcd")}
    drawn["files"] = {"mine.txt": b"3 1 2"}.__getitem__
    for name, rule in FORGET_SETS.items():
        indices = rule(drawn, rule.resolve(REQUIRED.get(name, {})))
        found["forget set"][f"{name} {rule.version}"] = _summary(torch.tensor(indices))
    digits = DATASETS["digits"]
    data = digits({}, digits.resolve({"label_noise": 0.05}))
    found["data set"][f"digits {digits.version}"] = _summary(torch.tensor(data.labels[data.splits["train"]]))
    return found


NUMBERS = Path(__file__).with_name("golden_numbers.json")

if __name__ == "__main__":
    for file, content in ((FILE, golden()), (NUMBERS, numbers())):
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        print(f"wrote {file.name}")
