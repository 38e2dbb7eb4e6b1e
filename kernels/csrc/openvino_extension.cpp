// The kernels as OpenVINO operators: opset and ONNX domain "latentrt", ops Attention and GroupNormSilu.
//
//   Attention(q, k, v) → out. Attributes: scale (0: 1 / sqrt(head_dim)), causal, heads_first (true: tensors are
//     [batch, heads, tokens, head_dim]; false: [batch, tokens, heads, head_dim]). f32 or bf16.
//   GroupNormSilu(x, weight, bias) → out. Attributes: groups, eps, silu, channels_last. f32, bf16 or f16.
//
// They run on the threads of the stream that OpenVINO executes the model on.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

#include "latentrt_kernels.h"

namespace {

void on_arena(void*, int count, void (*task)(void*, int), void* argument) {
    tbb::parallel_for(0, count, [=](int i) { task(argument, i); }, tbb::static_partitioner());
}

int arena_threads() { return std::clamp(tbb::this_task_arena::max_concurrency(), 1, 512); }

void check(const ov::Node* node, int status) {
    OPENVINO_ASSERT(status == LATENTRT_OK, node->get_type_name(), " ", node->get_friendly_name(), ": ",
                    latentrt_status_text(status));
}

latentrt_dtype dtype_of(const ov::element::Type& type) {
    if (type == ov::element::f32) return LATENTRT_FP32;
    if (type == ov::element::bf16) return LATENTRT_BF16;
    if (type == ov::element::f16) return LATENTRT_FP16;
    OPENVINO_THROW("latentrt: got element type ", type, ", expected f32, bf16 or f16; convert the input");
}

std::vector<float> floats(const ov::Tensor& tensor) {
    std::vector<float> out(tensor.get_size());
    if (tensor.get_element_type() == ov::element::f32) std::copy_n(tensor.data<float>(), out.size(), out.begin());
    else if (tensor.get_element_type() == ov::element::bf16)
        std::copy_n(tensor.data<ov::bfloat16>(), out.size(), out.begin());
    else std::copy_n(tensor.data<ov::float16>(), out.size(), out.begin());
    return out;
}

class Attention : public ov::op::Op {
public:
    OPENVINO_OP("Attention", "latentrt");

    Attention() = default;
    Attention(const ov::OutputVector& inputs, float scale, bool causal, bool heads_first)
        : Op(inputs), scale_(scale), causal_(causal), heads_first_(heads_first) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        OPENVINO_ASSERT(get_input_size() == 3, "latentrt.Attention: got ", get_input_size(),
                        " inputs, expected q, k, v");
        for (int i = 0; i < 3; i++)
            OPENVINO_ASSERT(get_input_partial_shape(i).rank().compatible(4), "latentrt.Attention: got shape ",
                            get_input_partial_shape(i), ", expected four dimensions");
        set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Attention>(inputs, scale_, causal_, heads_first_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("scale", scale_);
        visitor.on_attribute("causal", causal_);
        visitor.on_attribute("heads_first", heads_first_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape q = inputs[0].get_shape(), k = inputs[1].get_shape(), v = inputs[2].get_shape();
        const size_t head = heads_first_ ? 1 : 2, token = 3 - head;
        OPENVINO_ASSERT(k == v && k[0] == q[0] && k[head] == q[head] && k[3] == q[3], "latentrt.Attention: got q ", q,
                        ", k ", k, ", v ", v,
                        ", expected one batch, head count and head_dim, and as many keys as values");
        for (const ov::Tensor& input : inputs)
            OPENVINO_ASSERT(input.get_element_type() == inputs[0].get_element_type(),
                            "latentrt.Attention: got inputs of different types; convert them");
        outputs[0].set_shape(q);
        latentrt_attention_args args = {};
        args.dtype = dtype_of(inputs[0].get_element_type());
        args.batch = static_cast<int64_t>(q[0]);
        args.heads = static_cast<int64_t>(q[head]);
        args.queries = static_cast<int64_t>(q[token]);
        args.keys = static_cast<int64_t>(k[token]);
        args.head_dim = static_cast<int64_t>(q[3]);
        args.q = inputs[0].data();
        args.k = inputs[1].data();
        args.v = inputs[2].data();
        args.out = outputs[0].data();
        strides(inputs[0], args.q_stride);
        strides(inputs[1], args.k_stride);
        strides(inputs[2], args.v_stride);
        strides(outputs[0], args.out_stride);
        args.scale = scale_ != 0 ? scale_ : 1 / std::sqrt(static_cast<float>(q[3]));
        args.causal = causal_;
        args.threads = arena_threads();
        args.parallel = on_arena;
        check(this, latentrt_attention(&args));
        return true;
    }

private:
    void strides(const ov::Tensor& tensor, int64_t (&to)[3]) const {
        const ov::Strides bytes = tensor.get_strides();
        const size_t size = tensor.get_element_type().size(), head = heads_first_ ? 1 : 2;
        OPENVINO_ASSERT(bytes[3] == size, "latentrt.Attention: got a head dimension that is not contiguous");
        to[0] = static_cast<int64_t>(bytes[0] / size);
        to[1] = static_cast<int64_t>(bytes[head] / size);
        to[2] = static_cast<int64_t>(bytes[3 - head] / size);
    }

    float scale_ = 0;
    bool causal_ = false, heads_first_ = true;
};

class GroupNormSilu : public ov::op::Op {
public:
    OPENVINO_OP("GroupNormSilu", "latentrt");

    GroupNormSilu() = default;
    GroupNormSilu(const ov::OutputVector& inputs, int64_t groups, float eps, bool silu, bool channels_last)
        : Op(inputs), groups_(groups), eps_(eps), silu_(silu), channels_last_(channels_last) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        OPENVINO_ASSERT(get_input_size() == 3, "latentrt.GroupNormSilu: got ", get_input_size(),
                        " inputs, expected x, weight, bias");
        set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<GroupNormSilu>(inputs, groups_, eps_, silu_, channels_last_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("groups", groups_);
        visitor.on_attribute("eps", eps_);
        visitor.on_attribute("silu", silu_);
        visitor.on_attribute("channels_last", channels_last_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape shape = inputs[0].get_shape();
        OPENVINO_ASSERT(shape.size() >= 2 && inputs[0].is_continuous(), "latentrt.GroupNormSilu: got shape ", shape,
                        ", expected a dense tensor of at least two dimensions");
        outputs[0].set_shape(shape);
        const size_t channels = shape[channels_last_ ? shape.size() - 1 : 1];
        const std::vector<float> weight = floats(inputs[1]), bias = floats(inputs[2]);
        OPENVINO_ASSERT(weight.size() == channels && bias.size() == channels, "latentrt.GroupNormSilu: got ",
                        weight.size(), " weights and ", bias.size(), " biases, expected ", channels, " of both");
        latentrt_group_norm_args args = {};
        args.dtype = dtype_of(inputs[0].get_element_type());
        args.batch = static_cast<int64_t>(shape[0]);
        args.channels = static_cast<int64_t>(channels);
        args.positions = static_cast<int64_t>(inputs[0].get_size() / (shape[0] * channels));
        args.groups = groups_;
        args.x = inputs[0].data();
        args.weight = weight.data();
        args.bias = bias.data();
        args.out = outputs[0].data();
        args.eps = eps_;
        args.silu = silu_;
        args.channels_last = channels_last_;
        args.threads = arena_threads();
        args.parallel = on_arena;
        check(this, latentrt_group_norm(&args));
        return true;
    }

private:
    int64_t groups_ = 32;
    float eps_ = 1e-5f;
    bool silu_ = false, channels_last_ = false;
};

ov::OutputVector inputs_of(const ov::frontend::NodeContext& node) {
    ov::OutputVector inputs;
    for (size_t i = 0; i < node.get_input_size(); i++) inputs.push_back(node.get_input(static_cast<int>(i)));
    return inputs;
}

ov::OutputVector convert_attention(const ov::frontend::NodeContext& node) {
    return std::make_shared<Attention>(inputs_of(node), node.get_attribute<float>("scale", 0),
                                       node.get_attribute<int64_t>("causal", 0) != 0,
                                       node.get_attribute<int64_t>("heads_first", 1) != 0)
        ->outputs();
}

ov::OutputVector convert_group_norm(const ov::frontend::NodeContext& node) {
    return std::make_shared<GroupNormSilu>(
               inputs_of(node), node.get_attribute<int64_t>("groups", 32), node.get_attribute<float>("eps", 1e-5f),
               node.get_attribute<int64_t>("silu", 0) != 0, node.get_attribute<int64_t>("channels_last", 0) != 0)
        ->outputs();
}

} // namespace

OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{
    std::make_shared<ov::OpExtension<Attention>>(),
    std::make_shared<ov::OpExtension<GroupNormSilu>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("Attention", "latentrt", convert_attention),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("GroupNormSilu", "latentrt", convert_group_norm),
}))
