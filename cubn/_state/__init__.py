"""What a BatchNormState is made of: its arrays, its options, and what keeps them fit for each other."""
