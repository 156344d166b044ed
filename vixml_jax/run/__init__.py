"""What training, evaluation, inference and compilation share: config, model, state, checkpoint, workdir."""
