// What llama.cpp makes of a GGUF file, for tests/test_llama_cpp.py. Every line of standard input is one sequence.
//   driver MODEL tokens          hexadecimal bytes of a text -> its token ids, special tokens read as such
//   driver MODEL logits OUTPUT   token ids ("ENCODER | DECODER" for an encoder-decoder) -> float32 logits of every
//                                position, one after the other, in OUTPUT
//   driver MODEL quantize OUTPUT FTYPE   what llama-quantize writes, FTYPE a number of enum llama_ftype
#include "llama.h"

#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

static int fail(const char * what) {
    std::fprintf(stderr, "driver: %s failed\n", what);
    return 1;
}

static int tokens(const llama_vocab * vocab) {
    for (std::string line; std::getline(std::cin, line);) {
        std::string text;
        for (size_t i = 0; i + 1 < line.size(); i += 2) {
            text.push_back((char) std::stoi(line.substr(i, 2), nullptr, 16));
        }
        std::vector<llama_token> ids(text.size() + 16);
        const int count = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), true, true);
        if (count < 0) return fail("tokenizing");
        for (int i = 0; i < count; i++) std::printf("%d ", ids[i]);
        std::printf("\n");
    }
    return 0;
}

static int logits(llama_model * model, const char * output) {
    const int size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 2;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.swa_full = true;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return fail("making a context");
    FILE * file = std::fopen(output, "wb");
    if (!file) return fail("opening the output");
    const bool has_encoder = llama_model_has_encoder(model);
    for (std::string line; std::getline(std::cin, line);) {
        std::vector<llama_token> encoder, decoder;
        bool second = !has_encoder;
        std::istringstream words(line);
        for (std::string word; words >> word;) {
            if (word == "|") second = true;
            else (second ? decoder : encoder).push_back(std::stoi(word));
        }
        llama_memory_clear(llama_get_memory(context), true);
        if (has_encoder && llama_encode(context, llama_batch_get_one(encoder.data(), encoder.size()))) {
            return fail("encoding");
        }
        llama_batch batch = llama_batch_init(decoder.size(), 0, 1);
        batch.n_tokens = decoder.size();
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i] = decoder[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch)) return fail("decoding");
        for (int i = 0; i < batch.n_tokens; i++) std::fwrite(llama_get_logits_ith(context, i), 4, size, file);
        llama_batch_free(batch);
    }
    return std::fclose(file) ? fail("writing the output") : 0;
}

int main(int argc, char ** argv) {
    const std::string job = argc > 2 ? argv[2] : "";
    if (job == "quantize" && argc == 5) {
        llama_model_quantize_params params = llama_model_quantize_default_params();
        params.ftype = (llama_ftype) std::stoi(argv[4]);
        return llama_model_quantize(argv[1], argv[3], &params) ? fail("quantizing") : 0;
    }
    if (!(job == "tokens" && argc == 3) && !(job == "logits" && argc == 4)) return fail("reading the command line");
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = job == "tokens";
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) return fail("loading the model");
    return job == "tokens" ? tokens(llama_model_get_vocab(model)) : logits(model, argv[3]);
}
