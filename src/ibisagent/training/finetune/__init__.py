"""Fine-tuning of any policy on TRL: supervised and by rewards."""
