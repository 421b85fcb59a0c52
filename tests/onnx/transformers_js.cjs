// Answers with Transformers.js: node transformers_js.cjs DIRECTORY TASK < JSON of {texts, pairs}.
// Prints the type of the weights, the pipeline's answers to the texts and the logits of the padded batch.
const { basename, dirname } = require('node:path');
const { readFileSync } = require('node:fs');
const { env, pipeline } = require('@huggingface/transformers');

async function main() {
    const [directory, task] = process.argv.slice(2);
    env.allowRemoteModels = false;
    env.localModelPath = dirname(directory);
    const { texts, pairs } = JSON.parse(readFileSync(0, 'utf8'));
    const answer = await pipeline(task, basename(directory));
    const batch = answer.tokenizer(texts, { text_pair: pairs, padding: true, truncation: true });
    const output = await answer.model(batch);
    console.log(JSON.stringify({
        dtype: Object.values(answer.model.sessions)[0].config.dtype,
        answers: pairs ? null : await answer(texts),
        logits: output.logits.tolist(),
    }));
}

main().catch((error) => { console.error(error.message); process.exit(1); });
