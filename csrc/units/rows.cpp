// Translation unit of the Python module and the sweeps over rows. Parsing torch's headers takes longer than
// compiling the kernels, so the files of csrc/cpu are compiled in three units instead of one by one.
// Names in an anonymous namespace must differ within a unit.
#include "../cpu/rows.cpp"

#include "../cpu/batch_norm_act_rows.cpp"
#include "../cpu/depthwise_conv2d_rows.cpp"
#include "../cpu/gemm.cpp"
#include "../cpu/local_affinity_rows.cpp"
#include "../cpu/scratch.cpp"
#include "../cpu/stores.cpp"
#include "../cpu/tile.cpp"
#include "../cpu/upsample_rows.cpp"
#include "../library.cpp"
