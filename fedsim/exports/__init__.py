"""What a finished run deployed, taken home: as a PEFT adapter, as a model of transformers, or as an object that predicts."""
