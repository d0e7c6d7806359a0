// The plugins as TensorRT uses them up to the first enqueue, without TensorRT: made from a node's fields, asked for
// types, shapes and formats, written, and made again at run time. Prints what is wrong; the exit status is 0 where
// nothing is.
#include "creator_fakes.h"

#include <cmath>
#include <cstdio>

namespace {

using namespace fakes;

int failures = 0;
Logger logger;

void check(bool good, std::string const& what) {
  if (!good) {
    ++failures;
    std::printf("FAILED %s\n%s", what.c_str(), logger.errors.c_str());
  }
}

// A node of 2 heads of 8 over 12 of 14 tokens of 16, of which 8 stay.
struct Case {
  char const* name;
  std::string inputs, outputs;
  std::vector<Sizes> shapes;  // of the inputs, batch 3
  void (*options)(Fields&);
};

Sizes const X = {3, 14, 16}, K = {3, 2, 14, 8}, ROW = {3, 2, 14}, SIZE = {3, 12};

std::vector<Case> const CASES = {
    {"Dart", "x,normed,rotated_k", "x,index", {X, X, K},
     [](Fields& f) { f.ints("option_pivots", {4}), f.ints("option_text_pivots", {4}), f.ints("text", {0}); }},
    {"Dart", "x,normed,rotated_k", "x,index", {X, {3, 20, 16}, {3, 2, 20, 8}},
     [](Fields& f) { f.ints("option_pivots", {4}), f.ints("option_text_pivots", {3}), f.ints("text", {0, 1, 13, 15, 16, 20}); }},
    {"Dart", "x,normed,k", "x,index,assign", {X, X, K}, [](Fields& f) { f.ints("option_pivots", {1}); }},
    {"Topk", "x,cls_attention", "x,index", {X, ROW}, [](Fields&) {}},
    {"Topk", "x,received_attention", "x,index,assign", {X, ROW}, [](Fields&) {}},
    {"Fastv", "x,last_attention", "x,index", {X, ROW}, [](Fields&) {}},
    {"Fastervlm", "x,cls_attention", "x,index", {X, ROW}, [](Fields&) {}},
    {"Fopru", "x,received_attention", "x,index", {X, ROW}, [](Fields& f) { f.text("option_strategy", "rank"); }},
    {"Pyramiddrop", "x,size,last_attention", "x,index,size", {X, SIZE, ROW}, [](Fields&) {}},
    {"Evit", "x,cls_attention", "x,index", {X, ROW}, [](Fields& f) { f.ints("option_fuse", {1}); }},
    {"Tome", "x,size,k", "x,index,size", {X, SIZE, K}, [](Fields& f) { f.ints("prefix", {1}); }},
    {"Tome", "x,k,size", "x,size,index,assign", {X, K, SIZE}, [](Fields& f) { f.ints("prefix", {1}); }},
    {"Pitome", "x,size,k", "x,index,size", {X, SIZE, K},
     [](Fields& f) {
       f.ints("block", {3}), f.ints("depth", {12}), f.number("option_margin", 0.75f);
       f.ints("option_alpha", {1}), f.text("option_variant", "deit");
     }},
    {"Divprune", "x", "x,index,assign", {X}, [](Fields&) {}},
};

Fields node(Case const& c) {
  Fields f;
  f.text("inputs", c.inputs), f.text("outputs", c.outputs);
  f.ints("n", {12}), f.ints("k", {8}), f.ints("unit", {1}), f.ints("start", {1}), f.ints("tap_start", {1});
  c.options(f);
  return f;
}

Fields node(char const* name) {
  for (auto const& c : CASES) {
    if (!std::strcmp(c.name, name)) {
      return node(c);
    }
  }
  return {};
}

std::vector<std::string> names(std::string const& joined) {
  std::vector<std::string> out = {""};
  for (char c : joined) {
    c == ',' ? void(out.emplace_back()) : void(out.back() += c);
  }
  return out;
}

// What each tensor's type must be where x has `type`.
DataType wanted(std::string const& name, DataType type) {
  return name == "size" ? DataType::kFLOAT : name == "index" || name == "assign" ? DataType::kINT64 : type;
}

void checkFormats(Case const& c, Plugin const& p, DataType type) {
  auto const in = names(c.inputs), out = names(c.outputs);
  std::vector<DynamicPluginTensorDesc> all;
  for (auto const& name : in) {
    all.push_back(profile({1}, wanted(name, type)));
  }
  for (auto const& name : out) {
    all.push_back(profile({1}, wanted(name, type)));
  }
  auto supported = [&](size_t i) {
    return p.build->supportsFormatCombination(int32_t(i), all.data(), int32_t(in.size()), int32_t(out.size()));
  };
  for (size_t i = 0; i < all.size(); ++i) {
    check(supported(i), std::string(c.name) + ": its own types");
    auto const kept = all[i];
    all[i].desc.format = TensorFormat::kCHW32;
    check(!supported(i), std::string(c.name) + ": a vectorized format");
    all[i] = kept;
    for (auto other : {DataType::kINT32, DataType::kBOOL, DataType::kINT8}) {
      all[i].desc.type = other;
      check(!supported(i), std::string(c.name) + ": a type that no kernel takes");
    }
    all[i].desc.type = kept.desc.type == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
    check(!supported(i) || i == 0, std::string(c.name) + ": two types in one node");
    all[i] = kept;
  }
}

void checkShapes(Case const& c, Plugin const& p, int64_t batch) {
  Builder builder;
  std::vector<DimsExprs> in;
  for (auto sizes : c.shapes) {
    sizes[0] = batch;
    in.push_back(builder.shape(sizes));
  }
  auto const outputs = names(c.outputs);
  std::vector<DimsExprs> out(outputs.size());
  int32_t const nbIn = int32_t(in.size()), nbOut = int32_t(out.size());
  int32_t const code = p.build->getOutputShapes(in.data(), nbIn, nullptr, 0, out.data(), nbOut, builder);
  check(code == 0, std::string(c.name) + ": shapes");
  for (size_t i = 0; i < out.size(); ++i) {
    auto const& name = outputs[i];
    Sizes const want = name == "x" ? Sizes{batch, 10, 16} : name == "assign" ? Sizes{batch, 12} : Sizes{batch, 8};
    check(sizes(out[i]) == want, std::string(c.name) + ": shape of " + name);
  }
}

void checkCase(Case const& c) {
  logger.errors.clear();
  auto fields = node(c);
  auto wide = fields.widened();
  wide.longs("c0", {1, 2, 3}), wide.text("method", "any"), wide.number("option_new", 2);  // what no plugin knows
  auto const p = create(c.name, fields.collection(), TensorRTPhase::kBUILD);
  auto const q = create(c.name, wide.collection(), TensorRTPhase::kBUILD);
  check(p && q, std::string(c.name) + ": made from its fields");
  if (!p || !q) {
    return;
  }
  check(written(p) == written(q), std::string(c.name) + ": the same from 32-bit and 64-bit integers");
  for (int32_t i = 0; i < fields.collection()->nbFields; ++i) {
    auto const& f = fields.collection()->fields[i];
    bool const whole = f.type == PluginFieldType::kINT32 && std::string(f.name) == "option_alpha";  // written as a float
    check(whole || written(p).find(written(f)) != std::string::npos, std::string(c.name) + ": does not write " + f.name);
  }
  check(std::string(p.core->getPluginName()) == c.name && std::string(p.core->getPluginNamespace()) == "tokcompile" &&
            std::string(p.core->getPluginVersion()) == "1",
        std::string(c.name) + ": its name");
  Plugin const again = create(c.name, p.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  check(again && written(again) == written(p), std::string(c.name) + ": equal after it was written and read");
  Plugin const cloned(p.plugin->clone()), attached(p.runtime->attachToContext(nullptr));
  check(cloned && written(cloned) == written(p), std::string(c.name) + ": equal to its clone");
  check(attached && written(attached) == written(p), std::string(c.name) + ": equal to its clone in a context");
  auto const in = names(c.inputs), out = names(c.outputs);
  check(p.build->getNbOutputs() == int32_t(out.size()), std::string(c.name) + ": count of outputs");
  for (auto type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    std::vector<DataType> given, got(out.size());
    std::vector<DynamicPluginTensorDesc> small, large, results(out.size());
    std::vector<PluginTensorDesc> now, after(out.size());
    for (size_t i = 0; i < in.size(); ++i) {
      auto sizes = c.shapes[i];
      given.push_back(wanted(in[i], type));
      small.push_back(profile(sizes, given[i]));
      now.push_back(describe(sizes, given[i]));
      sizes[0] = 300;
      large.push_back(profile(sizes, given[i]));
      large[i].desc.dims.d[0] = -1;  // a batch of the profile
    }
    int32_t const nbIn = int32_t(in.size()), nbOut = int32_t(out.size());
    check(p.build->getOutputDataTypes(got.data(), nbOut, given.data(), nbIn) == 0, std::string(c.name) + ": types");
    for (size_t i = 0; i < out.size(); ++i) {
      check(got[i] == wanted(out[i], type), std::string(c.name) + ": type of " + out[i]);
    }
    checkFormats(c, p, type);
    check(p.build->configurePlugin(large.data(), nbIn, results.data(), nbOut) == 0,
          std::string(c.name) + ": a profile");
    check(p.runtime->onShapeChange(now.data(), nbIn, after.data(), nbOut) == 0,
          std::string(c.name) + ": shapes at run time");
    size_t const little = p.build->getWorkspaceSize(small.data(), nbIn, results.data(), nbOut);
    size_t const much = p.build->getWorkspaceSize(large.data(), nbIn, results.data(), nbOut);
    check(little > 0 && much > little, std::string(c.name) + ": workspace for the largest batch");
  }
  checkShapes(c, p, 3);
  checkShapes(c, p, -1);
  check(logger.errors.empty(), std::string(c.name) + ": nothing to complain of");
}

void refused(char const* name, void (*change)(Fields&), std::string const& message) {
  logger.errors.clear();
  auto fields = node(name);
  change(fields);
  for (auto phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
    check(!create(name, fields.collection(), phase), std::string(name) + " is made despite: " + message);
  }
  auto const whole = "tokcompile plugin " + std::string(name) + " \"reduction_0\": " + message;
  check(logger.errors.find(whole) != std::string::npos, "no message: " + whole);
}

// So many runs of one text token each, after the tokens.
std::vector<int32_t> runs(int32_t count) {
  std::vector<int32_t> out;
  for (int32_t i = 0; i < count; ++i) {
    out.push_back(20 + 2 * i), out.push_back(21 + 2 * i);
  }
  return out;
}

void checkRefusals() {
  refused("Dart", [](Fields& f) { f.ints("k", {13}); }, "attribute k is 13; it must be an integer from 1 to n = 12");
  refused("Dart", [](Fields& f) { f.ints("k", {0}); }, "attribute k is 0; it must be an integer of at least 1");
  refused("Dart", [](Fields& f) { f.longs("k", {8589934600}); }, "attribute k is 8589934600; it must be an integer");
  refused("Dart", [](Fields& f) { f.ints("k", {8, 9}); }, "attribute k is 8 and 1 more; it must be an integer");
  refused("Dart", [](Fields& f) { f.number("k", 8); }, "attribute k is 8; it must be an integer");
  refused("Dart", [](Fields& f) { f.text("k", "8"); }, "attribute k is \"8\"; it must be an integer");
  refused("Dart", [](Fields& f) { f.set("k", PluginFieldType::kINT32, nullptr, 0, 0); }, "attribute k is empty");
  refused("Dart", [](Fields& f) { f.set("k", PluginFieldType::kINT8, "\3", 1, 1); },
          "attribute k is of PluginFieldType 3");
  refused("Dart", [](Fields& f) { f.remove("k"); }, "attribute k is missing; it is an integer of at least 1");
  refused("Dart", [](Fields& f) { f.remove("option_pivots"); },
          "attribute option_pivots is missing; it is an integer of");
  refused("Dart", [](Fields& f) { f.ints("option_pivots", {0}); },
          "attribute option_pivots is 0; it must be an integer of");
  refused("Dart", [](Fields& f) { f.ints("text", {0, 1, 13}); }, "attribute text has 3 numbers; it must be starts and");
  refused("Dart", [](Fields& f) { f.ints("text", {13, 13}); }, "attribute text goes from 13 to 13; it must be starts");
  refused("Dart", [](Fields& f) { f.ints("text", {14, 16, 13, 14}); }, "attribute text goes from 13 to 14; it must be");
  refused("Dart", [](Fields& f) { f.ints("text", {-1, 1}); }, "attribute text is -1 and 1 more; it must be integers of");
  refused("Dart", [](Fields& f) { f.ints("text", {25, 26}), f.ints("unit", {2}); },
          "attribute option_text_pivots is 4; it must be 0 for groups of 2");
  refused("Dart", [](Fields& f) { f.ints("text", runs(129)); }, "attribute text has more than 128 runs of text after");
  refused("Fopru", [](Fields& f) { f.text("option_strategy", "row"); },
          "attribute option_strategy is \"row\"; it must be one of rank");
  refused("Dart", [](Fields& f) { f.text("inputs", "x,k"); },
          "attribute inputs is \"x,k\"; it must name x, normed, k, and x first");
  refused("Dart", [](Fields& f) { f.text("inputs", "normed,x,k"); },
          "attribute inputs is \"normed,x,k\"; it must name x");
  refused("Dart", [](Fields& f) { f.text("inputs", "x,normed,k,k"); }, "attribute inputs is \"x,normed,k,k\"; it must");
  refused("Dart", [](Fields& f) { f.text("inputs", ""); },
          "attribute inputs is \"\"; it must name x, normed, rotated_k");
  refused("Dart", [](Fields& f) { f.text("inputs", "x,normed,k,size"); }, "attribute inputs is \"x,normed,k,size\"");
  refused("Dart", [](Fields& f) { f.text("outputs", "x,index,size"); },
          "attribute outputs is \"x,index,size\"; it must name x, index, with or without assign, and x first");
  refused("Dart", [](Fields& f) { f.text("outputs", "x"); }, "attribute outputs is \"x\"; it must name x, index");
  refused("Tome", [](Fields& f) { f.text("outputs", "index,x"); },
          "attribute outputs is \"index,x\"; it must name x, index, with or without size and assign, and x first");
  refused("Topk", [](Fields& f) { f.ints("start", {-1}); },
          "attribute start is -1; it must be an integer of at least 0");
  refused("Evit", [](Fields& f) { f.ints("option_fuse", {2}); },
          "attribute option_fuse is 2; it must be an integer from 0");
  refused("Tome", [](Fields& f) { f.ints("k", {5}); },
          "attribute k is 5; it must be at least 6 of n = 12 to merge pairs");
  refused("Tome", [](Fields& f) { f.ints("prefix", {2}); },
          "attribute tap_start is 1; it must be as even as prefix = 2 groups of 1, which ToMe counts from");
  refused("Tome", [](Fields& f) { f.ints("tap_start", {0}); },
          "attribute tap_start is 0; it must be as even as prefix = 1");
  refused("Pitome", [](Fields& f) { f.text("option_variant", "C"); },
          "attribute option_variant is \"C\"; it must be one of deit, mae, P, B");
  refused("Pitome", [](Fields& f) { f.number("option_margin", NAN); },
          "attribute option_margin is nan; it must be a finite");
  refused("Pitome", [](Fields& f) { f.text("option_alpha", "1"); },
          "attribute option_alpha is \"1\"; it must be a finite");
  refused("Pitome", [](Fields& f) { f.ints("depth", {0}); },
          "attribute depth is 0; it must be an integer of at least 1");
}

// Where one input of `c` has other sizes: the message, in getOutputShapes and in onShapeChange.
void misshapen(Case const& c, size_t input, Sizes const& sizes, std::string const& message) {
  auto fields = node(c);
  auto const p = create(c.name, fields.collection(), TensorRTPhase::kBUILD);
  auto shapes = c.shapes;
  shapes[input] = sizes;
  Builder builder;
  std::vector<DimsExprs> in, out(names(c.outputs).size());
  std::vector<PluginTensorDesc> now, after(out.size());
  for (auto const& s : shapes) {
    in.push_back(builder.shape(s));
    now.push_back(describe(s, DataType::kFLOAT));
  }
  int32_t const nbIn = int32_t(in.size()), nbOut = int32_t(out.size());
  for (bool runtime : {false, true}) {
    logger.errors.clear();
    int32_t const code = runtime ? p.runtime->onShapeChange(now.data(), nbIn, after.data(), nbOut)
                                 : p.build->getOutputShapes(in.data(), nbIn, nullptr, 0, out.data(), nbOut, builder);
    check(code != 0, std::string(c.name) + " takes it: " + message);
    check(logger.errors.find(message) != std::string::npos, "no message: " + message);
  }
}

void checkMisshapen() {
  auto const &dart = CASES[0], &text = CASES[1], &topk = CASES[3], &tome = CASES[10];
  misshapen(dart, 0, {3, 12, 16}, "input x is 3x12x16; it must hold n = 12 groups of unit = 1 from start = 1");
  misshapen(dart, 0, {14, 16}, "input x is 14x16; it must have 3 dimensions");
  misshapen(dart, 1, {3, 14, 8}, "input normed is 3x14x8; it must be as wide as x, 16");
  misshapen(dart, 1, {2, 14, 16}, "input normed is 2x14x16; it must have the batch of x, 3");
  misshapen(dart, 2, {3, 2, 15, 8}, "input rotated_k is 3x2x15x8; it must be as long as the tap before it, 14");
  misshapen(text, 1, {3, 19, 16}, "input normed is 3x19x16; it must hold the text up to 20");
  misshapen(topk, 1, {3, 2, 12},
            "input cls_attention is 3x2x12; it must hold n = 12 groups of unit = 1 from tap_start = 1");
  misshapen(CASES.back(), 0, {3, 14, 9000}, "the kernel does not take 12 tokens in groups of 1 over x of 3x14x9000");
  misshapen(tome, 1, {3, 11}, "input size is 3x11; it must hold n = 12 sizes");
}

void checkCounts() {
  auto fields = node(CASES[0]);
  auto const p = create("Dart", fields.collection(), TensorRTPhase::kBUILD);
  DataType in[2] = {DataType::kFLOAT, DataType::kFLOAT}, out[2];
  logger.errors.clear();
  check(p.build->getOutputDataTypes(out, 2, in, 2) != 0, "Dart takes two inputs");
  std::string const message = "the node has 2 inputs and 2 outputs; its attributes name x,normed,rotated_k";
  check(logger.errors.find(message) != std::string::npos, "no message: " + message);
}

}  // namespace

int main() {
  setLoggerFinder(&logger);
  int32_t count = 0;
  check(getCreators(count) && count == 10, "ten creators");
  check(!creator("Grid") && !creator("Random"), "grid and random stay plain ops");
  for (auto const& c : CASES) {
    checkCase(c);
  }
  checkRefusals();
  checkMisshapen();
  checkCounts();
  std::printf("%d failed\n", failures);
  return failures != 0;
}
