"""Export of trained encoders and label vectors to the formats of other libraries."""
