// Decoding of DFloat11 weights on a CPU: Huffman codes of exponents (huffman.py says how they lie) and
// the raw bytes of sign and mantissa become bfloat16 numbers.
//
// Each thread takes blocks of chunks. A block is cut into four runs of chunks, each of which begins where
// its first chunk's gap says, so that four chains of look-ups hide each other's latency. A look-up takes
// kWindow bits and gives all symbols whose codes end in them. Symbols lie in the first-level cache until
// they are joined with their signs and mantissas.
//
// Nothing is read or written beyond what is handed over, whatever the codes, gaps, positions and tables
// say: what no encoder wrote is reported, and the output is then undefined.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kChunk = 64;    // bits
constexpr int64_t kBlock = 512;   // chunks
constexpr int64_t kPadding = 12;  // bytes after the last chunk
constexpr int kGap = 5;           // bits
constexpr int kPointer = 240;     // entries from here on point to another table
constexpr int kRuns = 4;          // runs of a block that are decoded side by side
constexpr int kWindow = 12;       // bits of a look-up
constexpr int kMost = 6;          // symbols of a look-up
constexpr int kLookups = 4;       // between two reads of the stream; no more than 57 / kWindow
constexpr int64_t kRunBits = kBlock / kRuns * kChunk;

// Up to six symbols, the first in the lowest byte; how many; the bits of their codes.
struct Entry {
  uint8_t symbols[kMost];
  uint8_t count, bits;
};
static_assert(sizeof(Entry) == 8, "an entry is one word");

struct Code {
  int symbol, bits;  // 0 bits: there is no such code
};

struct Decoder {
  const uint8_t* tables;
  int64_t count;  // tables
  std::vector<Entry> entries;

  Decoder(const uint8_t* tables, int64_t count) : tables(tables), count(count), entries(1 << kWindow) {
    for (uint32_t window = 0; window < entries.size(); ++window) {
      Entry& entry = entries[window];
      entry = Entry{};
      uint32_t bits = window << (32 - kWindow);
      while (entry.count < kMost) {
        const Code code = one(bits);
        if (code.bits == 0 || entry.bits + code.bits > kWindow) break;
        entry.symbols[entry.count++] = uint8_t(code.symbol);
        entry.bits += uint8_t(code.bits);
        bits <<= code.bits;
      }
    }
  }

  // The code that 32 bits begin with.
  Code one(uint32_t bits) const {
    int entry = tables[bits >> 24];
    for (int shift = 16; entry >= kPointer; shift -= 8) {
      const int64_t table = 256 - entry;
      if (shift < 0 || table >= count) return {0, 0};
      entry = tables[table * 256 + (bits >> shift & 255)];
    }
    const int length = tables[count * 256 + entry];
    return {entry, length > 32 ? 0 : length};
  }
};

struct Run {
  int64_t at, end;  // bits
  uint8_t* out;
};

inline uint64_t window_at(const uint8_t* codes, int64_t at) {
  uint64_t word;
  std::memcpy(&word, codes + (at >> 3), 8);
  return __builtin_bswap64(word) << (at & 7);
}

// Decode one symbol; whether there was one.
inline bool step(const Decoder& decoder, const uint8_t* codes, Run& run) {
  const Code code = decoder.one(uint32_t(window_at(codes, run.at) >> 32));
  *run.out++ = uint8_t(code.symbol);
  run.at += code.bits;
  return code.bits > 0;
}

// Decode symbols as long as one read cannot go beyond the end of the run; whether all was well.
inline bool stride(const Decoder& decoder, const uint8_t* codes, Run& run) {
  uint64_t word = window_at(codes, run.at);
  for (int i = 0; i < kLookups; ++i) {
    const Entry entry = decoder.entries[word >> (64 - kWindow)];
    if (entry.count == 0) return step(decoder, codes, run);
    std::memcpy(run.out, &entry, 8);
    run.out += entry.count;
    run.at += entry.bits;
    word <<= entry.bits;
  }
  return true;
}

bool decode_runs(const Decoder& decoder, const uint8_t* codes, Run* runs) {
  bool well = true;
  const auto far = [](const Run& run) { return run.at + kLookups * kWindow <= run.end; };
  while (well && far(runs[0]) && far(runs[1]) && far(runs[2]) && far(runs[3]))
    for (int r = 0; r < kRuns; ++r) well &= stride(decoder, codes, runs[r]);
  for (int r = 0; r < kRuns; ++r) {
    while (well && far(runs[r])) well = stride(decoder, codes, runs[r]);
    while (well && runs[r].at < runs[r].end) well = step(decoder, codes, runs[r]);
  }
  return well;
}

void join(const uint8_t* exponents, const uint8_t* rest, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = uint16_t((rest[i] & 0x80) << 8 | exponents[i] << 7 | (rest[i] & 0x7F));
}

int64_t gap_of(const uint8_t* gaps, int64_t chunk) {
  const int64_t bit = chunk * kGap, byte = bit / 8, shift = bit % 8;
  int value = gaps[byte] >> shift;
  if (shift + kGap > 8) value |= gaps[byte + 1] << (8 - shift);
  return value & ((1 << kGap) - 1);
}

}  // namespace

extern "C" {

struct Stream {
  const uint8_t *codes, *gaps, *tables, *rest;
  const int32_t* positions;
  int64_t chunks, count_tables, symbols;  // whose sizes are those of the arrays, which the caller checks
};

// Decode all symbols into out [symbols]; 0 when all was well.
int64_t decode_bf16(const Stream* stream, uint16_t* out, int64_t threads) {
  const Decoder decoder(stream->tables, stream->count_tables);
  const int64_t blocks = (stream->chunks + kBlock - 1) / kBlock;
  std::atomic<int64_t> damaged{0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t buffer[kRuns][kRunBits + 2 * kChunk];
    Run runs[kRuns];
    for (int r = 0; r < kRuns; ++r) {
      const int64_t first = std::min(block * kBlock + r * (kBlock / kRuns), stream->chunks);
      const int64_t last = std::min(first + kBlock / kRuns, stream->chunks);
      const int64_t gap = first < last ? gap_of(stream->gaps, first) : 0;
      runs[r] = {first * kChunk + gap, last * kChunk, buffer[r]};
    }
    int64_t at = stream->positions[block];
    const int64_t end = stream->positions[block + 1];
    bool well = at >= 0 && at <= end && end <= stream->symbols;
    well = well && decode_runs(decoder, stream->codes, runs);
    for (int r = 0; well && r < kRuns; ++r) {
      const int64_t count = runs[r].out - buffer[r], wanted = std::min(count, end - at);
      // What fills the last chunk may read as symbols too.
      well = wanted == count || block + 1 == blocks;
      join(buffer[r], stream->rest + at, out + at, wanted);
      at += wanted;
    }
    if (!well || at != end) damaged = 1;
  }
  return damaged;
}
}
