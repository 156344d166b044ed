"""The grids of the studies: what is varied, that every config is valid, and what is refused."""

import pytest

from tests.helpers.miniature_runs import load_config
from vixml_jax.errors import InputError
from vixml_jax.run import configuration
from vixml_jax.studies.grids import STUDIES, cells_of
from vixml_jax.studies.run_study import folder_name, plan_study

CONFIGS = dict.fromkeys(STUDIES, ("quickstart", "images=3")) | {"attention": ("quickstart", "encoder=qwen2.5-tiny")}


@pytest.mark.parametrize("study", STUDIES)
def test_all_configs_of_a_study_are_valid_and_different(study, tmp_path):
  config = load_config(*CONFIGS[study])
  runs = plan_study(study, config, 2, "validation", tmp_path)
  cells = cells_of(study, config)
  assert len(runs) == 2 * len(cells) and {run.seed for run in runs} == {0, 1}
  assert len({run.workdir for run in runs}) == len(runs)
  recipes = {configuration_text(run.config) for run in runs}
  assert len(recipes) == len(runs)
  assert len(cells) >= (1 if study == "seeds" else 2)


def configuration_text(config):
  return str(sorted(configuration.flatten_config(config).items()))


def test_the_first_cell_is_the_config_as_it_is_and_no_other_repeats_it():
  config = load_config("quickstart", "images=3")
  first, *others = cells_of("mining", config)
  flat = configuration.flatten_config(config)
  assert first.changes == {}
  assert all(any(flat[key] != value for key, value in cell.changes.items()) for cell in others)
  assert "cluster_size=16" not in [cell.name for cell in others]  # That is the config's own.
  assert {cell.changes.get("loss.num_negatives") for cell in others} >= {1, 5, 30}


def test_prompts_are_all_orders_with_the_end_token_last():
  config = load_config("quickstart", "images=3")
  config.prompt.template = "T E V eos"
  found = {cell.changes.get("prompt.template", config.prompt.template) for cell in cells_of("prompts", config)}
  assert found == {"T E V eos", "T V E eos", "E T V eos", "E V T eos", "V T E eos", "V E T eos"}


@pytest.mark.parametrize(
  ("study", "message"),
  [
    ("images", "needs a config with images"),
    ("adapters", "needs a config with images"),
    ("fusion", "needs a config with images"),
    ("attention", "needs a decoder"),
    ("colors", "must be one of mining, prompts"),
  ],
)
def test_a_config_that_lacks_what_is_varied_is_refused(study, message):
  with pytest.raises(InputError, match=message):
    cells_of(study, load_config("quickstart"))


def test_encoders_differ_in_weights_and_sizes_and_keep_how_they_are_computed():
  config = load_config("quickstart", "images=3")
  cells = {cell.name: cell.config(config, 0) for cell in cells_of("encoders", config)}
  distilbert, bert = cells["encoder=distilbert"], cells["encoder=bert"]
  assert (distilbert.encoder.num_layers, distilbert.encoder.num_token_types, distilbert.train.learning_rate) == (
    6,
    0,
    2e-4,
  )
  assert (bert.encoder.num_layers, bert.encoder.pretrained, bert.train.learning_rate) == (
    12,
    "intfloat/e5-base-v2",
    1e-4,
  )
  assert {other.encoder.dtype for other in cells.values()} == {config.encoder.dtype} == {"float32"}
  decoders = cells_of("encoders", load_config("custom", "encoder=qwen2.5-0.5b"))
  ends = {cell.name: cell.changes.get("prompt.eos") for cell in decoders}
  assert "encoder=qwen2.5-0.5b" not in ends  # That is the config as it is.
  assert (ends["encoder=qwen3-0.6b"], ends["encoder=llama-3.2-1b"]) == ("<|endoftext|>", "<|end_of_text|>")


def test_an_invalid_config_names_the_run(tmp_path):
  config = load_config("quickstart", "images=3")
  config.dataset.validation_fraction = 0.0
  with pytest.raises(InputError, match=r"study methods, run 'as configured': config.eval.* needs held-out queries"):
    plan_study("methods", config, 1, "validation", tmp_path)


def test_names_of_folders_have_no_other_characters():
  names = [folder_name(cell) for study in STUDIES for cell in cells_of(study, load_config(*CONFIGS[study]))]
  assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzVETI0123456789.=_-") for name in names)
