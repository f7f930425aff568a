"""Options that are others than those of the resumed run: what counts, what is refused, what is reported."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.options.base import Given, Options
from library.options.optimizer import OptimizerOptions
from library.runtime.logs import LOGGER
from library.training import state, state_notes
from library.training.lr_schedules import make_schedule, wants_loss
from library.training.optimizers import make_optimizer
from library.training.plan import Progress, make_plan
from library.training.resuming import require_optimizer, settings_of

DATA = SimpleNamespace(content=list, num_train_images=4, num_reg_images=0)


class Training:
    """A run on two small layers, each with a group of its own."""

    def __init__(self, steps=20, rates=(1e-2, 5e-3), data=DATA, explicit=("learning_rate",), batches=4, **options):
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"one": nn.Linear(3, 4), "two": nn.Linear(4, 2)})
        chosen = OptimizerOptions(**{"learning_rate": 1e-2, **options})
        groups = [
            {"params": list(layer.parameters()), "lr": rate, "name": name}
            for (name, layer), rate in zip(self.net.items(), rates, strict=True)
        ]
        self.optimizer = make_optimizer(groups, chosen)
        self.schedule = make_schedule(self.optimizer, chosen, steps)
        plan = make_plan(batches, 1, 1, steps=steps, epochs=None, by_default=False)
        opts = Options([chosen], dict.fromkeys(explicit, Given(None, "command line")))
        self.settings = settings_of(self.optimizer, opts, plan, data)
        self.done = 0
        self.used = []  # the rates of each step

    @property
    def parts(self):
        return state.StateParts(self.net, self.optimizer, self.schedule)

    def step(self, count):
        for _ in range(count):
            self.optimizer.zero_grad()
            inputs = torch.sin(torch.arange(6.0).view(2, 3) + self.done)
            (self.net["two"](self.net["one"](inputs)) ** 2).mean().backward()
            self.used.append([group["lr"] for group in self.optimizer.param_groups])
            self.optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if wants_loss(self.schedule):
                    self.schedule.step(1.0)
                else:
                    self.schedule.step()
            self.done += 1
        return self

    def save(self, folder, *, notes=True):
        settings = self.settings.to_json() if notes else None
        state.save_state(folder, self.parts, Progress(self.done, 1), 0, settings=settings)
        return folder

    def resume(self, folder):
        state.load_state(folder, self.parts, settings=self.settings)
        self.done = state_notes.read_progress(folder).step
        return self


@pytest.fixture
def messages(caplog):
    LOGGER.propagate = True
    caplog.set_level("INFO")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(params=[True, False], ids=["with notes", "of an earlier version"])
def notes(request):
    return request.param


SCHEDULES = {
    "constant": {},
    "warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 8},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "restarts": {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
    "polynomial": {"lr_scheduler": "polynomial", "lr_scheduler_power": 2},
    "floor": {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ["min_lr=1e-4"]},
    "pieces": {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:3,0.1:9,0.01"]},
    "StepLR": {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=2", "gamma=0.5"]},
    "CosineAnnealingLR": {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=20", "eta_min=1e-4"]},
    "LinearLR": {"lr_scheduler_type": "LinearLR", "lr_scheduler_args": ["total_iters=9"]},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_changed_rate_counts_from_the_step_on_as_a_run_with_it_has_it(tmp_path, messages, notes, name):
    folder = Training(**SCHEDULES[name]).step(6).save(tmp_path / "s", notes=notes)
    again = Training(rates=(1e-3, 5e-3), **SCHEDULES[name]).resume(folder).step(5)
    like = Training(rates=(1e-3, 5e-3), **SCHEDULES[name]).step(11)
    assert again.used == [pytest.approx(rates, rel=1e-12) for rates in like.used[6:]]
    (line,) = messages()
    assert line == "the learning rate of one: 0.01 -> 0.001 (the former is the state's)"


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_changes_a_run_goes_on_bit_for_bit(tmp_path, messages, notes, name):
    whole = Training(**SCHEDULES[name]).step(6)
    folder = whole.save(tmp_path / "s", notes=notes)
    whole.step(5)
    again = Training(**SCHEDULES[name]).resume(folder).step(5)
    assert again.used == whole.used[6:]
    assert all(map(torch.equal, again.net.parameters(), whole.net.parameters()))
    assert messages() == []


def test_a_plateau_keeps_its_reductions(tmp_path, notes):
    options = {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": ["patience=1", "factor=0.5"]}
    folder = Training(**options).step(4).save(tmp_path / "s", notes=notes)  # the loss never falls: halved once
    assert Training(**options).resume(folder).step(1).used == [[5e-3, 2.5e-3]]
    again = Training(rates=(1e-3, 5e-3), **options).resume(folder).step(1)
    first = 5e-4 if notes else 5e-3  # an earlier version's state of a plateau does not tell where its rate began
    assert again.used == [[pytest.approx(first), pytest.approx(2.5e-3)]]


def test_settings_of_the_optimizer_count(tmp_path, messages, notes):
    folder = Training(optimizer_args=["weight_decay=0.1"]).step(3).save(tmp_path / "s", notes=notes)
    changed = ["weight_decay=0.3", "betas=0.8,0.9"]
    again = Training(optimizer_args=changed).resume(folder)
    assert [(group["weight_decay"], group["betas"]) for group in again.optimizer.param_groups] == [
        (0.3, (0.8, 0.9))
    ] * 2
    assert sorted(messages()) == [
        "--optimizer_args: betas of one, two: [0.9, 0.999] -> [0.8, 0.9] (the former is the state's)",
        "--optimizer_args: weight_decay of one, two: 0.1 -> 0.3 (the former is the state's)",
    ]


def test_what_an_optimizer_finds_out_is_no_setting(tmp_path, messages):
    """Prodigy's d grows from d0; a changed d0 does not throw away what was found."""
    options = {"optimizer_type": "Prodigy", "rates": (1.0, 1.0), "learning_rate": 1.0}
    whole = Training(**options).step(6)
    found = whole.optimizer.param_groups[0]["d"]
    folder = whole.save(tmp_path / "s")
    again = Training(**options, optimizer_args=["d_coef=2.0", "d0=1e-5"]).resume(folder)
    assert found != 1e-6
    assert [(group["d"], group["d_coef"]) for group in again.optimizer.param_groups] == [(found, 2.0)] * 2
    assert any("d_coef" in line for line in messages())


def test_a_rate_that_is_not_given_stays_that_of_the_state(tmp_path, messages):
    folder = Training().step(3).save(tmp_path / "s")
    default = {"learning_rate": 2e-6, "rates": (2e-6, 2e-6), "explicit": ()}
    again = Training(**default).resume(folder).step(1)
    assert again.used == [[1e-2, 5e-3]]
    assert messages() == ["--learning_rate was not given: that of the resumed run stays (0.005, 0.01)"]
    third = Training(**default).resume(again.save(tmp_path / "t")).step(1)
    assert third.used == [[1e-2, 5e-3]]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("constant", "cosine"),
        ("cosine", "StepLR"),
        ("StepLR", "restarts"),
        ("StepLR", "constant"),
        ("cosine", "pieces"),
    ],
)
def test_another_schedule_counts_from_the_step_on(tmp_path, messages, before, now):
    folder = Training(**SCHEDULES[before]).step(6).save(tmp_path / "s")
    again = Training(**SCHEDULES[now]).resume(folder).step(5)
    assert again.used == [pytest.approx(rates, rel=1e-12) for rates in Training(**SCHEDULES[now]).step(11).used[6:]]
    (line,) = messages()
    assert line.startswith("the schedule continues at step 6 with other options: --lr_scheduler ")
    assert "None" not in line  # what the other schedule does not have is no change


def test_a_changed_argument_of_a_schedule_of_torch_counts(tmp_path):
    folder = Training(**SCHEDULES["StepLR"]).step(6).save(tmp_path / "s")
    other = {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=2", "gamma=0.1"]}
    assert Training(**other).resume(folder).step(2).used == [
        pytest.approx(rates) for rates in Training(**other).step(8).used[6:]
    ]


def test_a_longer_run_takes_the_course_of_its_length(tmp_path, messages):
    folder = Training(steps=8, lr_scheduler="cosine").step(6).save(tmp_path / "s")
    again = Training(steps=20, lr_scheduler="cosine").resume(folder).step(5)
    assert again.used == Training(steps=20, lr_scheduler="cosine").step(11).used[6:]
    assert messages() == ["the schedule continues at step 6 with other options: steps 8 -> 20"]


def test_another_optimizer_is_refused(tmp_path):
    folder = Training().step(1).save(tmp_path / "s")
    settings = state_notes.read_settings(folder)
    require_optimizer(folder, settings, torch.optim.AdamW)
    with pytest.raises(UserError, match=r"was saved with the optimizer torch\.optim\.adamw\.AdamW, .* now says torch"):
        require_optimizer(folder, settings, torch.optim.SGD)
    require_optimizer(folder, {}, torch.optim.SGD)  # an earlier version's state does not tell


@pytest.mark.parametrize("other", ["SGD", "Lion", "RMSprop", "AdaFactor"])
def test_another_optimizer_is_seen_where_the_state_does_not_name(tmp_path, other):
    folder = Training().step(2).save(tmp_path / "s", notes=False)
    arguments = ["momentum=0.9"] if other == "SGD" else ["relative_step=False"] if other == "AdaFactor" else None
    with pytest.raises(UserError, match=r"optimizer\.bin does not fit --optimizer_type and --optimizer_args"):
        Training(optimizer_type=other, optimizer_args=arguments).resume(folder)


def test_other_data_is_one_warning(tmp_path, messages):
    def data(*lines):
        return SimpleNamespace(content=lambda: sorted(lines), num_train_images=len(lines), num_reg_images=0)

    folder = Training(data=data("a.png", "b.png")).step(1).save(tmp_path / "s")
    Training(data=data("b.png", "a.png")).resume(folder)
    assert messages() == []
    Training(data=data("a.png"), batches=2).resume(folder)
    Training(data=data("a.png", "c.png")).resume(folder)
    first, second = messages()
    assert "(2 images then, 1 now; 4 batches per epoch then, 2 now)" in first
    assert "(other files, sizes or repeats in as many images)" in second


@pytest.mark.parametrize(
    "damage", [{"data": 5}, {"groups": "x"}, {"groups": [3, None]}, {"schedule": []}, {"optimizer": {}}]
)
def test_notes_of_the_wrong_kind_are_as_good_as_none(tmp_path, damage):
    training = Training().step(1)
    saved = training.settings.to_json() | damage
    state.save_state(tmp_path / "s", training.parts, Progress(1, 1), 0, settings=saved)
    require_optimizer(tmp_path / "s", saved, torch.optim.AdamW)
    assert Training().resume(tmp_path / "s").step(1).used == [[1e-2, 5e-3]]
