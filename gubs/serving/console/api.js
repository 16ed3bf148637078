// Talks to the service. The key lives in this tab only.
const KEY = "gubs-key";

export class ServiceError extends Error {
  constructor(status, problem) {
    super(problem.message);
    this.status = status;
    this.code = problem.code;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

export async function call(path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const type = response.headers.get("Content-Type") || "";
  const answer = type.includes("json") ? await response.json() : await response.text();
  if (response.ok) return answer;
  throw new ServiceError(response.status, answer.error || { code: "unknown", message: `status ${response.status}` });
}
