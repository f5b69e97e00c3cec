// The best intervals of sorted rows (nested.py says of what): the dynamic programme over the ends of all
// prefixes, one more interval at a time, row by row.
//
// Every number is what nested.py's own operations give, and of equally good starts the first is taken, so
// that both find the same intervals. The library must be compiled without contraction to fused
// multiply-adds.

#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double kNothing = 1e-14;  // NOTHING in nested.py
constexpr double kNever = -std::numeric_limits<double>::infinity();

double gain(double mass, double moment) { return mass > kNothing ? moment * moment / mass : 0.0; }

struct Row {
  const double *mass, *moment;  // running sums, [places]
  const uint8_t* barred;        // [places]
  int64_t places;

  // The best cut of an interval, the first of equally good ones; its end where there is none.
  int64_t cut(int64_t low, int64_t high) const {
    double best = kNever;
    int64_t at = high;
    for (int64_t i = low + 1; i < high; ++i) {
      if (barred[i]) continue;
      const double left = gain(mass[i] - mass[low], moment[i] - moment[low]);
      const double found = left + gain(mass[high] - mass[i], moment[high] - moment[i]);
      if (found > best) best = found, at = i;
    }
    return at;
  }

  // Adds an interval at the end of every prefix. Ends are done by halving: with those at multiples of
  // 2 half known, the start for an end between two of them lies between their two starts.
  void one_more(std::vector<double>& gains, std::vector<double>& before, int32_t* starts) const {
    before.swap(gains);
    for (int64_t i = 0; i < places; ++i)
      if (barred[i]) before[i] = kNever;
    gains[0] = before[0];
    starts[0] = 0;
    int64_t half = 1;
    while (2 * half < places) half *= 2;
    for (; half; half /= 2)
      for (int64_t end = half; end < places; end += 2 * half) {
        const int64_t low = end > half ? starts[end - half] : 0;
        // Beyond the last odd end lies a known one now and then; torch's segments leave it out.
        const bool last = end + 2 * half >= places;
        const int64_t high = last ? places - 1 : starts[end + half];
        double best = kNever;
        int64_t at = low;
        for (int64_t start = low; start <= high && start <= end; ++start) {
          const double found = before[start] + gain(mass[end] - mass[start], moment[end] - moment[start]);
          if (found > best) best = found, at = start;
        }
        gains[end] = best;
        starts[end] = static_cast<int32_t>(at);
      }
  }
};

}  // namespace

// Writes the bounds [rows, clusters + 1] of the best intervals of each row.
extern "C" void best_intervals(const double* mass, const double* moment, const uint8_t* barred, int64_t rows,
                               int64_t places, int64_t clusters, int64_t* bounds, int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t r = 0; r < rows; ++r) {
    const Row row{mass + r * places, moment + r * places, barred + r * places, places};
    std::vector<double> gains(places), before(places);
    std::vector<int32_t> starts(places * (clusters - 1));
    for (int64_t i = 0; i < places; ++i) gains[i] = gain(row.mass[i], row.moment[i]);
    for (int64_t c = 0; c + 1 < clusters; ++c) row.one_more(gains, before, starts.data() + c * places);
    int64_t* own = bounds + r * (clusters + 1);
    own[clusters] = places - 1;
    for (int64_t c = clusters - 1; c > 0; --c) own[c] = starts[(c - 1) * places + own[c + 1]];
    own[0] = 0;
  }
}

// Writes the bounds [rows, 2 clusters + 1] after the best cut of every interval of bounds [rows, clusters + 1].
extern "C" void best_cuts(const double* mass, const double* moment, const uint8_t* barred, int64_t rows,
                          int64_t places, int64_t clusters, const int64_t* bounds, int64_t* cut,
                          int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t r = 0; r < rows; ++r) {
    const Row row{mass + r * places, moment + r * places, barred + r * places, places};
    const int64_t* own = bounds + r * (clusters + 1);
    int64_t* out = cut + r * (2 * clusters + 1);
    for (int64_t c = 0; c < clusters; ++c) {
      out[2 * c] = own[c];
      out[2 * c + 1] = row.cut(own[c], own[c + 1]);
    }
    out[2 * clusters] = own[clusters];
  }
}
