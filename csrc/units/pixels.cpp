// Translation unit of the ops on pixels and their classes; see rows.cpp.
#include "../cpu/batch_norm_act.cpp"
#include "../cpu/class_statistics.cpp"
#include "../cpu/domain_cross_entropy.cpp"
#include "../cpu/local_affinity.cpp"
#include "../cpu/lovasz_softmax.cpp"
#include "../cpu/upsample_confusion.cpp"
#include "../cpu/upsample_cross_entropy.cpp"
