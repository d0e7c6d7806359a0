#include "attributes.h"

#include <cmath>
#include <cstring>

namespace tokcompile {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// ONNX has 64-bit integers, of which parsers make kINT32 or kINT64.
bool isInteger(PluginField const& f) { return f.type == PluginFieldType::kINT32 || f.type == PluginFieldType::kINT64; }

template <class T>
T load(PluginField const& f, int32_t i = 0) {
  T value;  // data need not be aligned
  std::memcpy(&value, static_cast<char const*>(f.data) + i * sizeof value, sizeof value);
  return value;
}

int64_t integer(PluginField const& f, int32_t i = 0) {
  return f.type == PluginFieldType::kINT32 ? load<int32_t>(f, i) : load<int64_t>(f, i);
}

// With or without a zero at the end.
std::string characters(PluginField const& f) {
  auto const* data = static_cast<char const*>(f.data);
  return {data, strnlen(data, f.length)};
}

std::string allowed(Field const& field) {
  if (std::holds_alternative<float Attributes::*>(field.member)) {
    return "a finite number";
  }
  if (std::holds_alternative<std::string Attributes::*>(field.member)) {
    return field.among.empty() ? "a string" : "one of " + join(field.among);
  }
  auto const what = std::holds_alternative<int32_t Attributes::*>(field.member) ? "an integer" : "integers";
  if (field.most == INT32_MAX) {
    return text(what, " of at least ", field.least);
  }
  return text(what, " from ", field.least, " to ", field.most);
}

// A value as it was given, for messages.
std::string shown(PluginField const& f) {
  if (!f.data || f.length < 1) {
    return "empty";
  }
  if (f.type == PluginFieldType::kCHAR) {
    return text('"', characters(f), '"');
  }
  std::string more = f.length > 1 ? text(" and ", f.length - 1, " more") : "";
  if (isInteger(f)) {
    return text(integer(f), more);
  }
  if (f.type == PluginFieldType::kFLOAT32) {
    return text(load<float>(f), more);
  }
  if (f.type == PluginFieldType::kFLOAT64) {
    return text(load<double>(f), more);
  }
  return text("of PluginFieldType ", static_cast<int32_t>(f.type), more);
}

bool set(std::vector<int32_t>& to, Field const& field, PluginField const& f) {
  to.clear();
  for (int32_t i = 0; isInteger(f) && i < f.length; ++i) {
    if (integer(f, i) < field.least || integer(f, i) > field.most) {
      return false;
    }
    to.push_back(static_cast<int32_t>(integer(f, i)));
  }
  return !to.empty();
}

bool set(int32_t& to, Field const& field, PluginField const& f) {
  std::vector<int32_t> values;
  if (f.length != 1 || !set(values, field, f)) {
    return false;
  }
  to = values[0];
  return true;
}

bool set(float& to, Field const&, PluginField const& f) {
  if (f.length != 1) {
    return false;
  }
  if (f.type == PluginFieldType::kFLOAT32) {
    to = load<float>(f);
  } else if (f.type == PluginFieldType::kFLOAT64) {
    to = static_cast<float>(load<double>(f));
  } else if (isInteger(f)) {  // the exporter writes an option of 1 as an integer
    to = static_cast<float>(integer(f));
  } else {
    return false;
  }
  return std::isfinite(to);
}

bool set(std::string& to, Field const& field, PluginField const& f) {
  if (f.type != PluginFieldType::kCHAR || f.length < 1) {
    return false;
  }
  to = characters(f);
  bool found = field.among.empty();
  for (auto const& name : field.among) {
    found |= name == to;
  }
  return found;
}

PluginField declared(Field const& field) {
  PluginFieldType const types[] = {PluginFieldType::kINT32, PluginFieldType::kFLOAT32, PluginFieldType::kCHAR,
                                   PluginFieldType::kINT32};
  return PluginField(field.name, nullptr, types[field.member.index()], 1);
}

}  // namespace

Attributes readAttributes(Fields const& fields, nvinfer1::PluginFieldCollection const& given) {
  Attributes out;
  for (auto const& field : fields) {
    PluginField const* found = nullptr;
    for (int32_t i = 0; i < given.nbFields; ++i) {
      if (given.fields[i].name && !std::strcmp(given.fields[i].name, field.name)) {
        found = &given.fields[i];
      }
    }
    if (!found && field.optional) {
      continue;
    }
    if (!found) {
      throw Refusal(text("attribute ", field.name, " is missing; it is ", allowed(field)));
    }
    auto read = [&](auto member) { return found->data && set(out.*member, field, *found); };
    if (!std::visit(read, field.member)) {
      throw Refusal(text("attribute ", field.name, " is ", shown(*found), "; it must be ", allowed(field)));
    }
  }
  return out;
}

std::vector<PluginField> writeAttributes(Fields const& fields, Attributes const& attributes) {
  auto out = declareAttributes(fields);
  for (size_t i = 0; i < fields.size(); ++i) {
    if (auto* name = std::get_if<std::string Attributes::*>(&fields[i].member)) {
      out[i].data = (attributes.*(*name)).c_str();
      out[i].length = static_cast<int32_t>((attributes.*(*name)).size()) + 1;  // with the zero, as the parser gives it
    } else if (auto* number = std::get_if<float Attributes::*>(&fields[i].member)) {
      out[i].data = &(attributes.*(*number));
    } else if (auto* numbers = std::get_if<std::vector<int32_t> Attributes::*>(&fields[i].member)) {
      out[i].data = (attributes.*(*numbers)).data();
      out[i].length = static_cast<int32_t>((attributes.*(*numbers)).size());
    } else {
      out[i].data = &(attributes.*std::get<int32_t Attributes::*>(fields[i].member));
    }
  }
  return out;
}

std::vector<PluginField> declareAttributes(Fields const& fields) {
  std::vector<PluginField> out;
  for (auto const& field : fields) {
    out.push_back(declared(field));
  }
  return out;
}

std::vector<std::string> split(std::string const& names) {
  std::vector<std::string> out;
  std::istringstream stream(names);
  for (std::string name; std::getline(stream, name, ',');) {
    out.push_back(name);
  }
  return out;
}

std::string join(std::vector<std::string> const& names) {
  std::string out;
  for (auto const& name : names) {
    out += (out.empty() ? "" : ", ") + name;
  }
  return out;
}

}  // namespace tokcompile
