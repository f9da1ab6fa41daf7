// Translation unit of the ops that multiply features; see rows.cpp.
#include "../cpu/similarity.cpp"

#include "../cpu/aggregate_gradient.cpp"
#include "../cpu/both_hops.cpp"
#include "../cpu/category_pool.cpp"
#include "../cpu/contrast_softmax.cpp"
#include "../cpu/cycle_association_loss.cpp"
#include "../cpu/cycle_match.cpp"
#include "../cpu/divergence.cpp"
#include "../cpu/prototype_contrast.cpp"
#include "../cpu/smooth_max_pool.cpp"
#include "../cpu/spatial_aggregate.cpp"
