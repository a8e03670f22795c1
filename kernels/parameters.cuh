// What every kernel is launched with, by value. The host fills it in by these names, so each is 8 bytes wide:
// addresses and integers are long long, numbers are double; 0 where a kernel has no use for it.
#pragma once

constexpr int POSITION_AXES = 8; // axes of a position, those that step as one taken together
constexpr int LEVELS = 8;        // of the tree over the 256 columns of a tile

// x, y and the like: samples x channels x positions. Strides are in elements.
struct Operand {
    long long pointer;
    long long sample;
    long long channel;
    long long position; // where positions step as one
    long long vectors;  // whether every octet begins at a multiple of 16 bytes
    long long axes;     // of positions, for arrays of any strides
    long long extent[POSITION_AXES];
    long long stride[POSITION_AXES];
};

// What replaces the division of n by a constant: the upper half of n * multiplier, moved by shift; -1 for n itself.
struct Divisor {
    long long multiplier;
    long long shift;
};

// gamma and the like: one element per channel. format: 1 float16, 2 bfloat16, 3 float32, 4 float64; 0 for none.
struct Vector {
    long long pointer;
    long long format;
    long long stride;
};

// Of the merges of a level of the column tree of a sample's last tile at most one has unequal sides; it takes this share
// and weight: the bits of numbers of the type that is computed with.
struct LastTile {
    long long share[LEVELS];
    long long weight[LEVELS];
};

struct Parameters {
    long long samples;
    long long channels;
    long long positions;
    Operand x;
    Operand g;    // residual, or dy
    Operand y;    // y, or dx
    Operand r;    // dresidual; of a combination, what is added
    Operand mask; // bytes, 0 where absent; no channels
    // the tree over an aligned range of samples: leaves are tiles, padded to a power of two for each sample
    LastTile last;
    long long log2_tiles;  // padded tiles of a sample
    long long tiles;       // tiles of a sample that are there
    long long span;        // padded tiles of a row of nodes, a power of two
    long long rows;        // of nodes
    long long group;       // channels of a block
    long long merged;      // rows merged into one
    long long node_count;  // int64 (rows)
    long long node_first;  // float64 (rows, channels): mean or sum of dy
    long long node_second; // float64 (rows, channels): m2 or sum of dy * (x - mean)
    long long from_count;  // the same of the rows to be merged
    long long from_first;
    long long from_second;
    long long from_rows;
    // the nodes of several ranks: float64 (table_rows, 2 channels + 1), its rows table_step elements apart
    long long table;
    long long table_rows;
    long long table_step;
    long long merges; // int64 (table_rows): of the last two nodes on the stack, after each row was put there
    // statistics: count is int64 (), the others float64 (channels)
    long long count;
    long long mean;
    long long m2;
    long long var;
    long long invstd;
    double eps;
    long long coefficients; // Coefficients (channels)
    long long first;        // float64 (channels): sum of dy
    long long second;       // float64 (channels): sum of dy * (x - mean)
    // one bit an element: which y passed a ReLU, at bits_first + sample * bits_sample + channel * bits_channel +
    // position * bits_position
    long long bits;
    long long bits_first;
    long long bits_sample;
    long long bits_channel;
    long long bits_position;
    Vector gamma;
    Vector beta;
    long long kept_gamma; // float64 (channels): copies of the two
    long long kept_beta;
    Vector dgamma;
    Vector dbeta;
    // running statistics
    Vector old_mean;
    Vector old_var;
    Vector new_mean;
    Vector new_var;
    long long tracked;
    long long skipped;
    double momentum;
    long long cumulative;
    long long ddof; // of the variance, m2 / (count - ddof)
    // the grid
    long long blocks_across; // blocks side by side over the channels: the grid is numbered in one dimension
    long long lanes;         // threads side by side over the channels
    long long steps;         // rounds of a thread
    long long dense;         // whether octets of all operands begin at multiples of 16 bytes; in apply_rows, whether
                             // the operands fill their memory besides
    Divisor over_positions;
    Divisor over_channels;
    long long slot;          // bytes of shared memory of a staged piece
    // tickets: unsigned (1 + groups of channels), zeros at first; see tickets.cuh
    long long tickets;
    long long pieces;
    long long ahead;
    long long at_once; // channels of a group that are merged together
};
