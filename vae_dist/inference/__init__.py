"""Trained models at work: loading, sampling, reconstruction."""
