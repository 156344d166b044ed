"""`benchmarks.parity_torch` on a miniature: both sides agree without dropout, and an error on one side is found."""

import pytest

from benchmarks import parity_sides, parity_torch
from tests.helpers.image_features import write_random_features
from tests.helpers.miniature_runs import load_config, miniature_config
from vixml_jax import datasets
from vixml_jax.errors import InputError
from vixml_jax.run import configuration

FEATURES = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A config without dropout, with random image features. An epoch has five steps, the last of which is not full."""
  folder = tmp_path_factory.mktemp("parity")
  config = miniature_config(folder, num_train=70)
  builder = datasets.prepare("custom", config.dataset.raw_dir, config.dataset.data_dir)
  write_random_features(builder, config.dataset.data_dir, "random", FEATURES)
  config.images = 3
  config.features.update(dict(name="random", dim=FEATURES))
  config.encoder.update(dict(dropout=0.0, attention_dropout=0.0, projection_dropout=0.0))
  config.prototype.dropout = 0.0
  configuration.check(config)
  parity_sides.check_transcribed(config)
  return config


@pytest.fixture
def config(prepared):
  """A copy to change."""
  return prepared.copy_and_resolve_references()


def test_all_parts_of_the_loss_agree_at_every_step(config, tmp_path, capsys):
  losses = parity_torch.compare_steps(config, tmp_path, 12, control=True)  # Three epochs; clusters order two of them.
  printed = capsys.readouterr().out
  assert len(printed.splitlines()) == 1 + 1 + 12 + 2
  for part in ("loss", "triplet_label", "triplet_prototype", "triplet_reverse", "regulariser"):
    assert parity_torch.largest_difference(losses, part) < 1e-4, printed
  assert 0 < parity_torch.largest_difference(losses, "loss", "control") < 1e-3, printed
  assert losses["PyTorch"][-1]["loss"] < losses["PyTorch"][0]["loss"]


@pytest.mark.slow
def test_texts_alone_agree_as_well(config, tmp_path):
  config.images = 0
  losses = parity_torch.compare_steps(config, tmp_path, 3)
  assert parity_torch.largest_difference(losses, "loss") < 1e-4


def test_another_schedule_on_one_side_is_found(config, tmp_path, monkeypatch):
  make = parity_sides.torch_reference.make_optimizer
  monkeypatch.setattr(
    parity_sides.torch_reference, "make_optimizer", lambda model, **how: make(model, **how | {"warmup_steps": 0})
  )
  losses = parity_torch.compare_steps(config, tmp_path, 3)
  assert parity_torch.largest_difference(losses, "loss") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_with_dropout_both_sides_have_the_same_loss_on_average(config, tmp_path, rate, capsys, monkeypatch):
  config.encoder.update(dict(dropout=0.1, attention_dropout=0.1, projection_dropout=0.1))
  config.prototype.dropout = 0.1
  if rate != 0.1:  # PyTorch's encoder drops more than ours.
    load = parity_sides.transformers.BertModel.from_pretrained
    monkeypatch.setattr(
      parity_sides.transformers.BertModel,
      "from_pretrained",
      lambda folder, **how: load(folder, **how | {"hidden_dropout_prob": rate}),
    )
  found = parity_torch.compare_draws(config, tmp_path, 60)
  assert (max(map(abs, found.values())) < 4) == (rate == 0.1), capsys.readouterr().out


def test_without_dropout_both_sides_end_with_the_same_metrics(config, tmp_path, monkeypatch):
  config.train.epochs = 2
  found = parity_torch.train_both(config, tmp_path, seed=1)
  ours, theirs = found["vixml_jax"], found["PyTorch"]
  names = [name for name in theirs if "@" in name]
  assert {"P@1", "PSP@5", "R@100"} <= set(names)
  assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-4)
  assert ours["mean_losses"] == pytest.approx(theirs["mean_losses"], abs=1e-4) and len(ours["mean_losses"]) == 2
  monkeypatch.setattr(parity_torch, "train_and_evaluate", None)  # Finished runs are not repeated.
  monkeypatch.setattr(parity_torch, "train_transcription", None)
  assert parity_torch.train_both(config, tmp_path, seed=1) == found
  config.train.learning_rate /= 2
  with pytest.raises(InputError, match=r"torch\.json: was made with another config"):
    parity_torch.train_both(config, tmp_path, seed=1)


def test_the_table_has_means_and_standard_deviations_of_both_sides():
  def row(value):
    return dict.fromkeys(("P@1", "P@5", "PSP@1", "R@100"), value) | {"mean_losses": [0.5, 0.25], "train_seconds": 61.4}

  lines = parity_torch.table({seed: {"vixml_jax": row(30 + seed), "PyTorch": row(31)} for seed in (1, 3)}).splitlines()
  assert lines[2] == "| vixml_jax, seed 1 | 31.00 | 31.00 | 31.00 | 31.00 | 0.500 0.250 | 61 |"
  assert lines[4] == "| vixml_jax, mean of 2 | 32.00 ± 1.41 | 32.00 ± 1.41 | 32.00 ± 1.41 | 32.00 ± 1.41 |  |  |"
  assert [line.split("|")[1].strip() for line in lines[5:]] == [
    f"PyTorch, {x}" for x in ("seed 1", "seed 3", "mean of 2")
  ]


@pytest.mark.slow
def test_another_drawn_positive_on_one_side_is_found(config, tmp_path, monkeypatch):
  drawn = parity_sides.Run.drawn_positives
  monkeypatch.setattr(parity_sides.Run, "drawn_positives", lambda run, batch, step: drawn(run, batch, step + 1))
  losses = parity_torch.compare_steps(config, tmp_path, 1)
  assert parity_torch.largest_difference(losses, "loss") > 1e-3


@pytest.mark.parametrize(
  "changes,message",
  [
    ({}, r"config\.fusion\.residual=0\.4: the PyTorch transcription needs 0\.0"),
    ({"fusion.residual": 0.0}, r"config\.fusion\.modality_dropout=0\.2: "),
    ({"fusion.residual": 0.0, "fusion.modality_dropout": 0.0, "prompt.template": "E V"}, r"config\.prompt\.template=E"),
    ({"fusion.residual": 0.0, "fusion.modality_dropout": 0.0}, r"config\.train\.classifier_weight=0\.3: "),
    (
      {
        "fusion.residual": 0.0,
        "fusion.modality_dropout": 0.0,
        "train.classifier_weight": 0.0,
        "encoder.num_token_types": 0,
      },
      "not DistilBERT",
    ),
  ],
)
def test_a_config_that_the_transcription_does_not_cover_is_refused(changes, message):
  config = load_config("quickstart", "images=3")
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=message):
    parity_sides.check_transcribed(config)


def test_more_steps_than_the_run_has_are_refused(config, tmp_path):
  with pytest.raises(InputError, match=r"--steps=16: the config has 15 steps"):
    parity_torch.compare_steps(config, tmp_path, 16)
