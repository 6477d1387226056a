"""The key/value cache of decoding, for any device and for TPU."""
