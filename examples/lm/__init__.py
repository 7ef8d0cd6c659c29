"""The parts of the language-model example: model, data, one training run, the report. Only `training` knows dpcomm."""
