// `grid` and `random` have no plugin: what they keep is a constant, and a gather by constants leaves nothing to fuse.
#include "methods.h"

#include <algorithm>

namespace tokcompile {
namespace {

using A = Attributes;

// Merging needs a partner for each token that goes.
void checkHalf(A const& a) {
  if (a.k < a.n - a.n / 2) {
    throw Refusal(text("attribute k is ", a.k, "; it must be at least ", a.n - a.n / 2, " of n = ", a.n,
                       " to merge pairs"));
  }
}

// The method counts what is even from the node's prefix, the kernel from where the taps begin: they differ where
// another image of the sequence was made shorter in a block before.
void checkTome(A const& a) {
  checkHalf(a);
  int32_t const first = a.tap_start / a.unit;
  if (first % 2 != a.prefix % 2 || (first == 0) != (a.prefix == 0)) {
    throw Refusal(text("attribute tap_start is ", a.tap_start, "; it must be as even as prefix = ", a.prefix,
                       " groups of ", a.unit, ", which ToMe counts from: export with form=\"plain\""));
  }
}

// Pivots from text come from that after the image alone. Throws Refusal where the kernel takes no such text.
tc_text textAfter(A const& a) {
  tc_text out{};
  out.pivots = a.option_text_pivots;
  int64_t const end = a.tap_start + a.n * int64_t(a.unit);
  for (size_t i = 0; out.pivots && i + 1 < a.text.size(); i += 2) {
    if (a.text[i] < end) {
      continue;
    }
    if (out.spans == TC_TEXT_SPANS) {
      throw Refusal(text("attribute text has more than ", TC_TEXT_SPANS, " runs of text after the tokens: export with "
                         "form=\"plain\", or option_text_pivots 0"));
    }
    out.edges[2 * out.spans] = a.text[i];
    out.edges[2 * out.spans + 1] = a.text[i + 1];
    ++out.spans;
  }
  return out;
}

void checkDart(A const& a) {
  for (size_t i = 0; i + 1 < a.text.size(); i += 2) {
    if (a.text[i + 1] <= a.text[i] || (i && a.text[i] < a.text[i - 1])) {
      throw Refusal(text("attribute text goes from ", a.text[i], " to ", a.text[i + 1],
                         "; it must be starts and stops that ascend"));
    }
  }
  if (a.text.size() % 2 && a.text != std::vector<int32_t>{0}) {
    throw Refusal(text("attribute text has ", a.text.size(), " numbers; it must be starts and stops"));
  }
  if (textAfter(a).spans && a.unit > 1) {
    throw Refusal(text("attribute option_text_pivots is ", a.option_text_pivots, "; it must be 0 for groups of ", a.unit,
                       ": export with form=\"plain\""));
  }
}

int32_t pivots(A const& a) { return std::min(a.option_pivots, a.k); }

// Where all tokens stay there is nothing to fuse.
int32_t fuse(A const& a) { return a.option_fuse && a.k < a.n; }

// The first and the second half of the blocks use different variants: B pairs all tokens, P the most redundant ones.
int32_t pairsAll(A const& a) {
  bool const second = a.block >= (a.depth + 1) / 2;
  return a.option_variant == "B" || a.option_variant == (second ? "mae" : "deit");
}

float margin(A const& a) { return static_cast<float>(double(a.option_margin) * (1 - double(a.block) / a.depth)); }

size_t topkWorkspace(tc_shape const& s, A const& a) { return tc_topk_workspace(&s, fuse(a)); }

int32_t topk(tc_shape const& s, A const& a, Tensors const& t) {
  return tc_topk(&s, fuse(a), t.x, t.size, t.attention, t.out, t.index, t.new_size, t.assign, t.workspace, t.stream);
}

// The names that a tap of one meaning for the kernel goes by, the usual one first.
std::vector<std::string> const KEYS = {"rotated_k", "k"};
std::vector<std::string> const ATTENTION = {"cls_attention", "last_attention", "received_attention"};

}  // namespace

Fields Method::fields() const {
  Fields out = {
      {"inputs", &A::inputs}, {"outputs", &A::outputs}, {"n", &A::n, 1},           {"k", &A::k, 1},
      {"unit", &A::unit, 1},  {"start", &A::start, 0},  {"tap_start", &A::tap_start, 0},
  };
  out.insert(out.end(), options.begin(), options.end());
  return out;
}

std::vector<Method> const& methods() {
  static std::vector<Method> const all = {
      {"Dart", {{"normed"}, KEYS}, false,
       {{"option_pivots", &A::option_pivots, 1}, {"option_text_pivots", &A::option_text_pivots, 0, INT32_MAX, {}, true},
        {"text", &A::text, 0, INT32_MAX, {}, true}},
       checkDart,
       [](tc_shape const& s, A const& a) {
         auto const after = textAfter(a);
         return tc_dart_workspace(&s, pivots(a), &after);
       },
       [](tc_shape const& s, A const& a, Tensors const& t) {
         auto const after = textAfter(a);
         return tc_dart(&s, pivots(a), &after, t.x, t.normed, t.keys, t.out, t.index, t.assign, t.workspace, t.stream);
       }},
      {"Topk", {ATTENTION}, true, {}, nullptr, topkWorkspace, topk},
      {"Fastv", {ATTENTION}, true, {}, nullptr, topkWorkspace, topk},
      {"Fastervlm", {ATTENTION}, true, {}, nullptr, topkWorkspace, topk},
      {"Fopru", {ATTENTION}, true, {{"option_strategy", &A::option_strategy, 0, 0, {"rank"}}}, nullptr, topkWorkspace,
       topk},
      {"Pyramiddrop", {ATTENTION}, true, {}, nullptr, topkWorkspace, topk},
      {"Evit", {ATTENTION}, true, {{"option_fuse", &A::option_fuse, 0, 1}}, nullptr, topkWorkspace, topk},
      {"Tome", {{"k"}}, true, {{"prefix", &A::prefix, 0}}, checkTome,
       [](tc_shape const& s, A const&) { return tc_tome_workspace(&s); },
       [](tc_shape const& s, A const&, Tensors const& t) {
         return tc_tome(&s, t.x, t.size, t.keys, t.out, t.index, t.new_size, t.assign, t.workspace, t.stream);
       }},
      {"Pitome", {{"k"}}, true,
       {{"block", &A::block, 0}, {"depth", &A::depth, 1}, {"option_margin", &A::option_margin},
        {"option_alpha", &A::option_alpha}, {"option_variant", &A::option_variant, 0, 0, {"deit", "mae", "P", "B"}}},
       checkHalf, [](tc_shape const& s, A const& a) { return tc_pitome_workspace(&s, pairsAll(a)); },
       [](tc_shape const& s, A const& a, Tensors const& t) {
         return tc_pitome(&s, pairsAll(a), margin(a), a.option_alpha, t.x, t.size, t.keys, t.out, t.index, t.new_size,
                          t.assign, t.workspace, t.stream);
       }},
      {"Divprune", {}, false, {}, nullptr, [](tc_shape const& s, A const&) { return tc_divprune_workspace(&s); },
       [](tc_shape const& s, A const&, Tensors const& t) {
         return tc_divprune(&s, t.x, t.out, t.index, t.assign, t.workspace, t.stream);
       }},
  };
  return all;
}

}  // namespace tokcompile
