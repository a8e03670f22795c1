"""Real training runs on handwritten digits, healthy ones and ones with a planted fault, for diagnosis to judge."""
