"""Shared parts of the configs: every key with its default, the recipes, and the parser of variants."""

from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from configs.encoders import ENCODERS, END_TOKENS, LEARNING_RATES


def base_config() -> ConfigDict:
  """Returns a config with every key, typed by its default; the defaults are the recipe of the paper for encoders."""
  config = ConfigDict()
  config.name = ""  # Name of the default workdir, runs/NAME.
  config.seed = 0
  # "prime": a label is scored by its prototype. "dexa": by its embedding plus a free vector. "ngame": by its embedding.
  # "mean": by the mean of its embedding and its centroid, which suits an encoder that is not trained.
  config.method = "prime"

  config.dataset = ConfigDict(
    dict(
      name="",  # Name of a builder in vixml_jax.datasets.
      raw_dir="",  # Folder with trn.json.gz and the other files or archives; required until the set is prepared.
      data_dir="data",  # Prepared sets and cached tokens.
      allow_empty_filter=False,  # Accept an empty filter file although queries have the uids of labels.
      text_fields=("title",),
      max_length=32,  # Maximum number of tokens, special tokens included; longer texts are truncated.
      # Fraction of the training queries that is held out to choose settings; -1 for one that suits their number.
      validation_fraction=0.0,
      propensity_a=0.6,  # Constants of the propensity in PSP.
      propensity_b=2.6,
    )
  )
  config.images = 0  # Maximum number of images of an item, 0 to 5; 0 for texts only.
  config.features = ConfigDict(
    dict(
      name="siglip2_so400m14_384",  # Name of a feature set that extract_features has made in data_dir.
      dim=1152,  # Its width.
      checkpoint="",  # An .npz file or a folder; if given, main extracts missing features.
      variant="",  # Variant that the checkpoint must be; "" for any.
      # How its images are prepared: "auto" is "big_vision" for SigLIP (or "huggingface", "huggingface_bilinear"), and
      # "processor" for CLIP and DINOv2.
      preprocessing="auto",
    )
  )
  config.fusion = ConfigDict(
    dict(
      method="early",  # Images are tokens of the encoder. Or "late": an extra layer combines them with the pooled text.
      adapter="linear",  # Map from the features to the token width; or "mlp", "gated", "cross_attention".
      # Early fusion: norm of the linear map of the images that is added to the pooled text, relative to the text.
      residual=0.0,
      modality_dropout=0.0,  # Probability that all images of an item of a training batch are dropped.
      bank="auto",  # Features are on the "device", memory-mapped on the "host", or on the device if they fit ("auto").
    )
  )
  config.prompt = ConfigDict(
    dict(
      # The parts of an item: E is its text, V its images (early fusion), eos the end token; other names are phrases. An
      # item without images has neither V nor the phrase before it.
      template="V E",
      phrases=dict(T="This product text", I="and its image", T2="and its text"),
      eos="<|endoftext|>",  # End token.
    )
  )
  # The keys depend on the encoder; `use_encoder` sets them all.
  config.encoder = ConfigDict(ENCODERS["distilbert"])
  config.prototype = ConfigDict(dict(num_heads=8, mlp_dim=1024, dropout=0.1))
  config.loss = ConfigDict(
    dict(
      num_negatives=10,
      margin_min=0.1,
      margin_max=0.3,
      temperature=0.1,
      regulariser_weight=0.1,
      regulariser_margin=0.1,
      reverse_weight=1.0,  # Weight of the triplet loss of labels against queries.
    )
  )
  config.train = ConfigDict(
    dict(
      epochs=300,
      # Limit of training in minutes; 0 for none, -1 for 10 on CPUs and none on accelerators. Fewer steps are trained
      # where all epochs would take longer, by the time of the first steps. What comes before and after training is not
      # part of it.
      minutes=0.0,
      batch_size=2048,  # Queries per step over the whole mesh.
      learning_rate=2e-4,
      new_learning_rate=5e-4,  # Prototype network and image fusion.
      # Initial values of the prototype network and of the maps of images: "torch" for those of torch, as in the
      # published code, or "fan_in" for kernels uniform within 1 / sqrt(fan_in) and zero biases.
      new_init="torch",
      free_vector_learning_rate=5e-4,
      warmup_steps=100,
      # Weight of a further loss: the decoupled softmax of queries against a classifier of each label, which is trained
      # beside the encoder (DEXML, arXiv 2310.10636); 0 for none, -1 for 0.3 where the classifiers fit the memory. Its
      # vectors are not used after training.
      classifier_weight=0.0,
      classifier_learning_rate=0.02,
      weight_decay=0.01,
      # Whether weight decay includes the norm scales of the encoder's layers. `use_encoder` sets it for DistilBERT.
      decay_layer_norms=False,
      adam_eps=1e-6,
      clip_norm=0.0,  # Maximum global gradient norm; 0 for no clipping. The paper uses 1 for decoders.
      # A power of two, or 0 for a quarter of the labels, at most 65,536. With as many as labels, each has its own.
      free_vectors=65536,
      free_vector_init="xavier",  # Or "cluster_mean": the mean initial embedding of the labels that share the vector.
      positive_sampling="propensity",  # How the label of a query in a step is drawn; or "uniform".
      sampling_a=0.6,  # Constants of the propensity for sampling.
      sampling_b=2.6,
      # Number of tokens of a packed row, at least max_length; or 0 for a length that suits the platform.
      row_length=128,
      # Number of packed rows that are encoded at a time, over the whole mesh; or 0 for a whole batch, or the part of it
      # that fits the memory.
      chunk_rows=128,
      # Whether chunks are recomputed in the backward pass, if there are several. Memory then does not grow with the
      # batch.
      remat=True,
      # What runs over the chunks one after another: the whole "encoder", whose memory does not grow with the batch, or
      # each "layer". "layer" recomputes every product once, also with encoder.remat, and keeps the inputs of all layers
      # for the whole batch.
      chunks_in="encoder",
      # Lengths of prefixes of the embeddings, descending, such as (384, 192, 96): the loss is the mean of that of each
      # prefix, so that a prefix can be searched by itself. Empty for whole embeddings only (docs/small_vectors.md).
      matryoshka_dims=(),
      bank_dtype="float32",
      rng_impl="threefry2x32",  # Or "unsafe_rbg": faster dropout, but the numbers depend on the mesh.
      log_every_steps=50,
    )
  )
  config.mining = ConfigDict(
    dict(cluster_size=16, start_epoch=10, update_epochs=5, doubling_epochs=(20, 40, 60, 80, 100, 120))
  )
  config.mesh = ConfigDict(
    dict(
      data=-1,  # Devices that share the batch only; -1 for the remaining devices.
      # Devices that share the parameters and the batch. 0 for as few as leave three quarters of a device's memory to
      # the rest, and all others along data.
      fsdp=1,
      tensor=1,  # Devices that share each product.
    )
  )
  config.eval = ConfigDict(
    dict(
      search="exact",  # Or "scann".
      scann_recall=0.0,  # Share of the 100 best labels that ScaNN must find; 0 for settings by rules of thumb.
      split="test",  # Or "validation": the held-out training queries.
      every_epochs=0,  # Interval of evaluations before the end; 0 for none.
      ks=(1, 3, 5),
      recall_ks=(10, 100),
      bootstrap_samples=1000,  # For the 95% intervals; 0 for none.
      retrieval_augmented=True,  # Also evaluates with retrieval augmentation.
      # Neighbors of a query: "separate" takes the nearest labels and the nearest training queries; "joint" takes the
      # nearest of both together.
      retrieval_search="separate",
      retrieval_hits=100,  # Number of labels, or of both with "joint".
      retrieval_query_hits=0,  # Number of training queries with "separate"; 0 for as many as labels.
      retrieval_lambda=0.9,  # Weight of labels relative to training queries.
      retrieval_temperature=0.05,
      retrieval_choose=False,  # Whether lambda and temperature are chosen on the validation queries.
      # Whether the blend is fitted on the validation queries, evaluated and written to the label index.
      blend=False,
      # Whether the label index keeps the first 200 characters of each training query, which explanations of the server
      # show. Without them, explanations have the numbers of the rows.
      query_texts=True,
      # Times that each training query is used to train classifiers of labels on its embedding, whose scores the blend
      # reads; 0 for none, -1 for a number that suits the size of the data and the devices.
      classifier_epochs=-1,
      # Share of the classifiers in the vectors of labels: the vector of a label is its prototype plus the share times
      # its classifier. 0 for prototypes alone, -1 for the best on the validation queries. It needs `blend`, with which
      # classifiers are trained.
      classifier_share=0.0,
      # Baselines that are computed on the same split and printed below the results: "tfidf", "untrained", and "plt"
      # (needs the extra `baselines`). Their settings are chosen on the validation queries.
      baselines=(),
      test_images=(),  # Also evaluates with at most each of these numbers of images per test query.
      # Also evaluates plain search with each of these numbers of dimensions, in float32, int8 and bits. -1 stands for
      # those of train.matryoshka_dims, if there are any; empty for none.
      small_vectors=(-1,),
    )
  )
  config.checkpoint = ConfigDict(
    dict(
      every_steps=1000,  # Interval of checkpoints before the end.
      keep=2,  # Number of checkpoints that are kept.
    )
  )
  config.track = ConfigDict(
    dict(
      wandb_project="",  # Project of Weights & Biases that also receives the metrics (needs the extra `wandb`).
      mlflow_uri="",  # MLflow server that also receives them, http://HOST:PORT (needs the extra `mlflow`).
      mlflow_experiment="vixml_jax",  # Its experiment.
    )
  )
  config.profile = ConfigDict(dict(steps=""))  # FIRST:LAST, the training steps of which a trace is written.
  config.baselines = ConfigDict()  # Rows that are printed below the results: name -> metrics in percent.
  return config


def use_encoder(config: ConfigDict, name: str) -> None:
  """Sets the architecture, weights, learning rate and prompt of an encoder.

  Raises:
    ValueError: If the name is not in `ENCODERS`.
  """
  if name not in ENCODERS:
    raise ValueError(f"encoder={name}: must be one of {', '.join(ENCODERS)}")
  config.encoder = ConfigDict(ENCODERS[name])
  config.train.learning_rate = LEARNING_RATES[name]
  # The published code excludes parameters named `LayerNorm.weight`; DistilBERT's layers name their norms otherwise.
  config.train.decay_layer_norms = name == "distilbert"
  if is_decoder(config):
    config.train.update(dict(clip_norm=1.0, free_vector_init="cluster_mean"))
    config.prompt.template = (
      "E V" if name == "qwen2.5-tiny" else "T E I V eos"
    )  # MiniLM's tokenizer adds an end token itself.
    config.prompt.eos = next(token for start, token in END_TOKENS.items() if name.startswith(start))


def use_method(config: ConfigDict, method: str) -> None:
  """Sets the method: "prime", "ngame", "dexa" or "mean".

  All but PRIME get the loss of the code of NGAME and DEXA: a fixed margin and no loss of labels against queries. The
  free vectors of DEXA are trained at the rate of the encoder, so call this after that rate is set.

  Raises:
    ValueError: If the method is unknown.
  """
  if method not in ("prime", "ngame", "dexa", "mean"):
    raise ValueError(f"method={method}: must be prime, ngame, dexa or mean")
  config.method = method
  if method != "prime":
    config.loss.update(dict(margin_min=0.3, margin_max=0.3, reverse_weight=0.0))
    config.train.update(dict(free_vector_learning_rate=config.train.learning_rate, free_vector_init="xavier"))
    config.name += f"-{method}"


def is_decoder(config: ConfigDict) -> bool:
  """Whether the encoder is a decoder language model."""
  return config.encoder.architecture == "decoder"


def use_images(config: ConfigDict, images: str) -> None:
  """Sets the maximum number of images of an item, "0" to "5".

  Raises:
    ValueError: If the number is not "0" to "5".
  """
  if images not in tuple("012345"):
    raise ValueError(f"images={images}: must be 0 to 5")
  config.images = int(images)
  if config.images:
    config.name += f"-images{images}"


def make_robust(config: ConfigDict) -> None:
  """Adds what goes beyond the paper: the variant `robust` of the published configs.

  The images of random items of a training batch are dropped, so that the model also answers queries without images. A
  linear map of the mean image is added to the pooled text. Lambda and temperature of retrieval augmentation are chosen
  on held-out training queries.
  """
  config.name += "-robust"
  if config.images:
    config.fusion.update(dict(modality_dropout=0.2, residual=0.4))
  config.dataset.validation_fraction = 0.01
  config.eval.retrieval_choose = True


def parse_variant(text: str | None, **defaults: str) -> dict[str, str]:
  """Parses the text after the colon of `--config=FILE.py:key=value,word`.

  Args:
    text: Text after the colon; None if there is none.
    **defaults: Known keys and their defaults. A bare word sets `variant` if that is a known key.

  Returns:
    The value of each known key.

  Raises:
    ValueError: If a key is unknown.
  """
  chosen = dict(defaults)
  for part in filter(None, (text or "").split(",")):
    key, _, value = part.partition("=") if "=" in part else ("variant", "", part)
    if key not in chosen:
      raise ValueError(f"variant {part!r}: must be one of {', '.join(f'{k}=...' for k in defaults)}")
    chosen[key] = value
  return chosen


def published_config(
  name: str, dataset: str, variant: str | None, recipes: Mapping[str, tuple[int, float]] = MappingProxyType({})
) -> ConfigDict:
  """Returns the recipe of the paper for one of its data sets.

  The values are those of ViXML (arXiv 2511.13189, implementation details) and of the scripts of its code,
  `run_vixml_miniLML3_amzTitles131K.sh` and `run_vixml_qwen25_3B_amzTitles131K.sh`. Both scripts are for images. The
  text-only runs of encoders train for 300 epochs; when their clusters double is not published, and here they double in
  the same epochs as with images (docs/deviations.md).

  Args:
    name: Name of the config.
    dataset: Name of the data set's builder.
    variant: Text after the colon of `--config`: `encoder=` (a name in `ENCODERS`), `images=` (0 to 5), `method=`
      (prime, ngame, dexa or mean), `mesh=auto` (see `mesh.fsdp`) and the word `robust` (see `make_robust`).
    recipes: Batch size and learning rate by encoder, where they are not those of titles; "decoder" stands for all
      decoders.

  Raises:
    ValueError: If a part of the variant is unknown.
  """
  chosen = parse_variant(variant, encoder="distilbert", images="0", method="prime", mesh="", variant="")
  encoder = chosen["encoder"]
  config = base_config()
  config.name = f"{name}-{encoder}"
  config.dataset.name = dataset
  use_encoder(config, encoder)
  use_images(config, chosen["images"])
  # The published code searches labels and training queries together by default.
  config.eval.update(dict(retrieval_search="joint", retrieval_hits=500))
  if is_decoder(config):
    config.seed = 42
    config.train.update(dict(epochs=30, batch_size=1024 if encoder == "qwen2.5-7b" else 2048))
    # Every device holds a shard of the weights and gathers each layer when it is needed, once per chunk. So a batch of
    # titles is one chunk, whose layers are recomputed in the backward pass. On many chips, mesh=auto gathers from fewer
    # of them.
    config.mesh.update(dict(data=1, fsdp=-1))
    config.encoder.remat = True
    config.train.chunk_rows = config.train.batch_size * (28 if config.images else 20) // 64
    config.mining.update(dict(start_epoch=4, update_epochs=2, doubling_epochs=(8, 12, 16, 20, 24)))
  else:
    config.train.chunk_rows = 0
    if config.images:
      config.train.epochs = 150
  recipe = recipes.get("decoder" if is_decoder(config) else encoder)
  if recipe is not None:
    config.train.batch_size, config.train.learning_rate = recipe
  use_method(config, chosen["method"])
  if chosen["mesh"] not in ("", "auto"):
    raise ValueError(f"mesh={chosen['mesh']}: must be auto; set config.mesh.data, fsdp and tensor for a certain mesh")
  if chosen["mesh"]:
    config.mesh.fsdp = 0
  if chosen["variant"] == "robust":
    make_robust(config)
  elif chosen["variant"]:
    raise ValueError(f"variant {chosen['variant']!r}: must be robust")
  return config
