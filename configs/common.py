"""What all configs share: every key with its default, the recipes, and the parser of variants."""

from ml_collections import ConfigDict

from configs.encoders import ENCODERS, END_TOKENS, LEARNING_RATES


def base_config() -> ConfigDict:
  """Every key there is, typed by its default: the encoder recipe of the paper."""
  config = ConfigDict()
  config.name = ""  # Names the default workdir, runs/NAME.
  config.seed = 0

  config.dataset = ConfigDict(
    dict(
      name="",  # A builder of vixml_jax.datasets.
      raw_dir="",  # Folder with trn.json.gz ...; needed until the set is prepared.
      data_dir="data",  # Prepared sets and cached tokens.
      text_fields=("title",),
      max_length=32,  # Tokens, special ones included; longer texts lose their end.
      validation_fraction=0.0,  # Of the training queries, held out to choose settings.
      propensity_a=0.6,  # Constants of the propensity in PSP.
      propensity_b=2.6,
    )
  )
  config.images = 0  # Most images of an item, 0 to 5; 0 for texts only.
  config.features = ConfigDict(
    dict(
      name="siglip2_so400m14_384",  # A set that extract_features made in data_dir, and its width.
      dim=1152,
      checkpoint="",  # An .npz or a folder: main then extracts what is missing.
      variant="",  # "" for what the checkpoint's shapes say.
      preprocessing="big_vision",  # Or "huggingface", "huggingface_bilinear".
    )
  )
  config.fusion = ConfigDict(
    dict(
      method="early",  # Images are tokens of the encoder; or "late": they meet the pooled text in a layer of their own.
      adapter="linear",  # Or "mlp", "gated": from the features to the token width.
      residual=0.0,  # Early fusion: length of a map of the images that is added to the pooled text, in lengths of that.
      modality_dropout=0.0,  # Probability with which an item of a training batch loses its images.
      bank="auto",  # Features on the "device", on the "host" memory-mapped, or on the device if they fit.
    )
  )
  config.prompt = ConfigDict(
    dict(
      # The parts of an item: E its text, V its images (early fusion), phrases by name, and eos. The phrase before V is
      # left out, like V, where there are no images.
      template="V E",
      phrases=dict(T="This product text", I="and its image", T2="and its text"),
      eos="<|endoftext|>",  # Name of a token.
    )
  )
  # The keys are those of the encoder; `use_encoder` sets them all.
  config.encoder = ConfigDict(ENCODERS["distilbert"])
  config.prototype = ConfigDict(dict(num_heads=8, mlp_dim=1024, dropout=0.1))
  config.loss = ConfigDict(
    dict(
      num_negatives=10, margin_min=0.1, margin_max=0.3, temperature=0.1, regulariser_weight=0.1, regulariser_margin=0.1
    )
  )
  config.train = ConfigDict(
    dict(
      epochs=300,
      batch_size=2048,  # Of the whole mesh.
      learning_rate=2e-4,
      new_learning_rate=5e-4,  # Prototype network and image fusion.
      free_vector_learning_rate=5e-4,
      warmup_steps=100,
      weight_decay=0.01,
      adam_eps=1e-6,
      clip_norm=0.0,  # Global gradient norm; 0 for none. The paper: 1 for decoders.
      # A power of two. 0 takes a quarter of the labels, at most 65,536; as many as labels give each its own.
      free_vectors=65536,
      free_vector_init="xavier",  # Or "cluster_mean": of the initial embeddings of the labels that share the vector.
      positive_sampling="propensity",  # Or "uniform": how a query's label of the step is drawn.
      sampling_a=0.6,  # Constants of the propensity in sampling.
      sampling_b=2.6,
      row_length=128,  # Tokens in a packed row; at least max_length.
      chunk_rows=128,  # Packed rows encoded at a time, over the whole mesh.
      remat=True,  # Recompute chunks in the backward pass, if there are several: memory does not grow with the batch.
      bank_dtype="float32",
      rng_impl="threefry2x32",  # Or "unsafe_rbg": faster dropout, other numbers on another mesh.
      log_every_steps=50,
    )
  )
  config.mining = ConfigDict(
    dict(cluster_size=16, start_epoch=10, update_epochs=5, doubling_epochs=(20, 40, 60, 80, 100, 120))
  )
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  config.eval = ConfigDict(
    dict(
      search="exact",  # Or "scann".
      split="test",  # Or "validation": the held-out training queries.
      every_epochs=0,  # Besides the end; 0 for the end only.
      ks=(1, 3, 5),
      recall_ks=(10, 100),
      bootstrap_samples=1000,  # For the 95% intervals; 0 for none.
      retrieval_augmented=True,  # Adds the second row of results.
      retrieval_hits=100,  # Labels, and training queries, that retrieval-augmented inference looks at.
      retrieval_lambda=0.9,  # Weight of labels against training queries.
      retrieval_temperature=0.05,
      retrieval_choose=False,  # Choose both on the validation queries.
      test_images=(),  # Also evaluate with no more than each of these numbers of images a test query.
    )
  )
  config.checkpoint = ConfigDict(
    dict(
      every_steps=1000,  # Besides the end.
      keep=2,
    )
  )
  config.baselines = ConfigDict()  # Rows to print below the results: name -> metrics in percent.
  return config


def use_encoder(config: ConfigDict, name: str) -> None:
  """Sets architecture, weights, learning rate and prompt of an encoder.

  Raises:
    ValueError: for a name that is not in `ENCODERS`.
  """
  if name not in ENCODERS:
    raise ValueError(f"encoder={name}: not one of {', '.join(ENCODERS)}")
  config.encoder = ConfigDict(ENCODERS[name])
  config.train.learning_rate = LEARNING_RATES[name]
  if is_decoder(config):
    config.train.update(dict(clip_norm=1.0, free_vector_init="cluster_mean"))
    config.prompt.template = "E V" if name == "qwen2.5-tiny" else "T E I V eos"  # Its tokenizer ends texts itself.
    config.prompt.eos = next(token for start, token in END_TOKENS.items() if name.startswith(start))


def is_decoder(config: ConfigDict) -> bool:
  """Whether the encoder is a decoder language model."""
  return config.encoder.architecture == "decoder"


def use_images(config: ConfigDict, images: str) -> None:
  """Gives items up to that many images, "0" to "5".

  Beyond the paper, an item of a training batch loses its images now and then (`fusion.modality_dropout`), so that
  the model also answers queries without any; set it to 0 for the paper's recipe.

  Raises:
    ValueError: for another number.
  """
  if images not in tuple("012345"):
    raise ValueError(f"images={images}: must be 0 to 5")
  config.images = int(images)
  if config.images:
    config.fusion.modality_dropout = 0.2
    config.name += f"-images{images}"


def parse_variant(text: str | None, **defaults: str) -> dict[str, str]:
  """Reads what stands after the colon of `--config=FILE.py:key=value,word`.

  Args:
    text: what stands after the colon, or None.
    **defaults: the keys that the config knows; a bare word sets `variant`, if that is a key.

  Raises:
    ValueError: for a key that the config does not know.
  """
  chosen = dict(defaults)
  for part in filter(None, (text or "").split(",")):
    key, _, value = part.partition("=") if "=" in part else ("variant", "", part)
    if key not in chosen:
      raise ValueError(f"variant {part!r}: this config knows {', '.join(f'{k}=...' for k in defaults)}")
    chosen[key] = value
  return chosen


def published_config(name: str, dataset: str, encoder: str, images: str) -> ConfigDict:
  """The recipe of the paper for one of its data sets."""
  config = base_config()
  config.name = f"{name}-{encoder}"
  config.dataset.name = dataset
  use_encoder(config, encoder)
  use_images(config, images)
  if is_decoder(config):
    config.train.update(dict(epochs=30, batch_size=1024 if encoder == "qwen2.5-7b" else 2048))
    # Every chip holds a part of the weights and gathers each layer when it needs it, for each chunk: so a batch of
    # titles is one chunk, of which the layers are recomputed. On 256 chips, set mesh.data=16 as well.
    config.mesh.update(dict(data=1, fsdp=-1))
    config.encoder.remat = True
    config.train.chunk_rows = config.train.batch_size * (26 if config.images else 20) // 64
    config.mining.update(dict(start_epoch=4, update_epochs=2, doubling_epochs=(8, 12, 16, 20, 24)))
  elif config.images:
    config.train.epochs = 150
  return config
