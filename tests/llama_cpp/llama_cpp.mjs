// What llama.cpp makes of a GGUF file, by way of node-llama-cpp. The argument is a JSON file, stdout another:
//   {model, texts: [text, …], prompts: [[id, …], …], tokens}
//   {tokens: [[id, …], …], answers: [[id, …], …], probabilities: [[number, …], …], ended: [bool, …], …}
// Texts are encoded with control tokens live; answers are greedy, of at most `tokens`, without what ends them.
import fs from "node:fs";
import {getLlama} from "node-llama-cpp";

const request = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: request.model, useMmap: false});
const reply = {
    tokens: request.texts.map((text) => model.tokenize(text, true)),
    answers: [],
    probabilities: [],
    ended: [],
    eos: model.tokens.eos,
    chatTemplate: model.fileInfo.metadata.tokenizer.chat_template
};
const context = await model.createContext({contextSize: 1024});
const sequence = context.getSequence();
for (const prompt of request.prompts) {
    await sequence.clearHistory();
    const answer = [], probabilities = [];
    let ended = false;
    const drawn = sequence.evaluateWithMetadata(prompt, {confidence: true}, {temperature: 0, yieldEogToken: true});
    for await (const {token, confidence} of drawn) {
        if (ended = model.isEogToken(token))
            break;
        answer.push(token);
        probabilities.push(confidence);
        if (answer.length == request.tokens)
            break;
    }
    reply.answers.push(answer);
    reply.probabilities.push(probabilities);
    reply.ended.push(ended);
}
console.log(JSON.stringify(reply));
await llama.dispose();
